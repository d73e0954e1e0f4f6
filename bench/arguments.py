"""What the doors' command lines share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cosa_fast.errors import UserError
from cosa_fast.files import require_place


def result_file(name: str) -> Path:
    """The place of --out, with its folder made: nothing is measured that could then not be written. UserError, also for
    a name that charts and texts beside it may have."""
    path = Path(name)
    if path.suffix != ".json":
        raise UserError(f"--out {name}: the results are JSON; choose a name that ends in .json")
    require_place(path, "--out")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    """UserError if one of these options, or an entry of one that is a list, is given and less than 1."""
    for name in names:
        value = getattr(arguments, name)
        for entry in value if isinstance(value, Sequence) else [value]:
            if entry is not None and entry < 1:
                raise UserError(f"--{name.replace('_', '-')} {entry}: must be at least 1")


def split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """(configurations, key=value overrides) of a command line that takes both in any order."""
    return [item for item in settings if "=" not in item], [item for item in settings if "=" in item]
