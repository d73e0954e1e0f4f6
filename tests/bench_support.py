"""What the benchmarks' tests check of their files."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"


def assert_chart(path: Path) -> None:
    """A picture of more than two colours."""
    with Image.open(path) as image:
        assert image.width > 300
        assert image.convert("RGB").getcolors(2) is None


def assert_keys_of(name: str, written: dict[str, Any]) -> None:
    """A result file has all keys of a committed one, down to the first entry of every list and the first provider.
    Which providers, packages and figures of an evaluation there are depends on what was measured."""
    committed = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    committed.get("machine", {}).pop("commit_note", None)  # written by hand
    _assert_same_keys(written, committed, name)


def _assert_same_keys(found: Any, wanted: Any, place: str) -> None:
    if isinstance(wanted, list) and wanted:
        assert isinstance(found, list), place
        _assert_same_keys(found[0], wanted[0], f"{place}[0]")
    elif isinstance(wanted, dict):
        assert isinstance(found, dict), place
        last = place.rpartition(".")[2]
        if last in ("packages", "evaluation"):
            return
        if last == "providers":
            found, wanted = ({"first": next(iter(values.values()))} for values in (found, wanted))
        assert [key for key in found if key in wanted] == list(wanted), place
        for key in wanted:
            _assert_same_keys(found[key], wanted[key], f"{place}.{key}")
