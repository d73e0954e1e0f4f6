"""docs/notebook.ipynb: its cells run from top to bottom, on a small stand-in for the demo's data."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cosa_fast.data_pipeline.datasets.synthetic import generate

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs/notebook.ipynb"


def cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    generate(tmp_path / "data/demo", train=16, val=2, size=128, seed=0)
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells()):
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", []):
            assert "ITERATIONS = " in source
            source = "ITERATIONS = 3"
        exec(compile(source, f"cell {number}", "exec"), names)
    assert names["summary"].iteration == 3
    assert names["summary"].folder.report.is_file()
    assert 0 <= names["figures"]["seg_label_free"] <= 100
    assert [mask.ndim for mask in names["masks"]] == [2, 2]
    assert isinstance(names["shown"], Image.Image)


def test_it_shows_all_four_verbs_and_holds_no_outputs() -> None:
    calls = {
        node.func.attr
        for cell in cells()
        for node in ast.walk(ast.parse("".join(cell["source"])))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert {"load_config", "train", "evaluate", "segment"} <= calls
    assert not any(cell["outputs"] for cell in cells())
