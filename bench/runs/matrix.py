"""What an ablation file asks for.

    base: voc.yaml                      # a configuration: beside the file, or a shipped one
    overrides: [optim.batch_size=8]     # common to all runs
    seeds: [0, 1, 2]
    runs:                               # every row's own overrides; differences are taken to the first row
      paper: []
      csc_off: [loss.csc=0]

${NAME} stands for an environment variable, in `base` and in overrides. `like: OTHER.yaml` takes over the base, the
overrides (before its own) and the seeds of another ablation file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosa_fast.config.parsing import CONFIG_DIRECTORY, find_config, load_config, settings_named
from cosa_fast.config.reading import load_yaml, shown
from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError, hint
from cosa_fast.files import read_text
from cosa_fast.run.folder import RunFolder

SHIPPED = Path(__file__).parents[1] / "ablations"
KEYS = ("like", "base", "overrides", "seeds", "runs")
# What no override may set, with what does.
OWN = {"run.seed": "seeds", "run.name": "the names under runs", "run.output": "--output"}


@dataclass(frozen=True)
class Run:
    """One training: a row of the tables with one of the seeds. `settings`: what cosa_fast.train is given, the
    configuration's name first. `config`: what comes of them."""

    row: str
    seed: int
    settings: tuple[str, ...]
    config: Config

    @property
    def folder(self) -> RunFolder:
        """OUTPUT/ROW_SEED."""
        return RunFolder.of(self.config)

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"


@dataclass(frozen=True)
class Matrix:
    """An ablation file, as it is written, and its `runs`: all rows of the first seed, then all of the next."""

    name: str
    base: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: dict[str, tuple[str, ...]]
    runs: tuple[Run, ...]


def load_matrix(
    name: str,
    output: str | None = None,
    *,
    like: str | None = None,
    base: str | None = None,
    overrides: Sequence[str] = (),
) -> Matrix:
    """Read an ablation file (`table3.yaml` without a folder is found among the shipped ones) and the configuration of
    each of its runs.

    output: the folder of the runs' folders (default: runs/NAME, with the name of `like` or `base` behind it). like:
    an ablation file whose base, overrides and seeds count in place of this one's, or before them. base: in place of the
    file's. overrides: after the file's common ones, before those of the rows. UserError, one line that begins with the
    file, for whatever is wrong with it or with one of its runs.
    """
    path = _find(name)
    values = _read(path, like)
    if output is None:
        output = f"runs/{'_'.join([path.stem, *(Path(other).stem for other in (like, base) if other)])}"
    base = values["base"] if base is None else base
    common = (*values["overrides"], *overrides)
    for override in overrides:
        _check_override(override, "command line")
    found = find_config(Path(_expanded(base, f"{path}: base")), beside=values["folder"])
    source = found.name if found.parent == CONFIG_DIRECTORY else str(found)
    shared = tuple(_expanded(item, f"{path}: overrides") for item in common)
    runs = []
    for seed in values["seeds"]:
        for row, own in values["runs"].items():
            where = f"{path}: runs.{row}"
            place = (f"run.output={_as_text(output)}", f"run.name={_as_text(f'{row}_{seed}')}", f"run.seed={seed}")
            settings = (*shared, *(_expanded(item, where) for item in own), *place)
            try:
                runs.append(Run(row, seed, (source, *settings), load_config(source, settings)))
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
    return Matrix(path.stem, base, common, tuple(values["seeds"]), values["runs"], tuple(runs))


def _find(name: str, beside: Path | None = None) -> Path:
    """The ablation file that `name` means: itself, one of the folder `beside`, or a shipped one."""
    for candidate in (Path(name), *([beside / name] if beside else []), SHIPPED / name):
        if candidate.is_file():
            return candidate
    shipped = sorted(file.name for file in SHIPPED.glob("*.yaml"))
    raise UserError(
        f"ablations {name}: no such file{hint(name, shipped)}, nor one of the shipped ones ({', '.join(shipped)})"
    )


def _read(path: Path, like: str | None) -> dict[str, Any]:
    """base, overrides, seeds and rows of a file, with those of the file that it is like; `folder`: where base is looked
    for."""
    own, other, source = _keys(path), {}, path
    if like is not None or "like" in own:
        source = _find(own["like"] if like is None else like, beside=path.parent)
        other = _keys(source)
        if "like" in other:
            raise UserError(f"{source}: is like {other['like']} itself, so that {path} cannot be like it")
    values = own | other if like is not None else other | own
    for key, found in {"base": values.get("base"), "seeds": values.get("seeds"), "runs": own.get("runs")}.items():
        if found in (None, "", [], {}):
            raise UserError(f"{path}: {key} is missing; docs/ablations.md shows the format")
    if not isinstance(values["base"], str):
        raise UserError(f"{path}: base = {shown(values['base'])} must be the name of a YAML file")
    if not isinstance(own["runs"], dict):
        raise UserError(f"{path}: runs = {shown(own['runs'])} must be names with lists of overrides")
    common = _overrides(own.get("overrides"), f"{path}: overrides")
    return {
        "base": values["base"],
        "folder": (source if values["base"] is other.get("base") else path).parent,
        "overrides": (*_overrides(other.get("overrides"), f"{source}: overrides"), *common),
        "seeds": _seeds(values["seeds"], path),
        "runs": {_row(name, path): _overrides(given, f"{path}: runs.{name}") for name, given in own["runs"].items()},
    }


def _keys(path: Path) -> dict[str, Any]:
    """What the file says, by keys that are all known."""
    values = load_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a mapping with the keys {', '.join(KEYS)}")
    for key in values:
        if key not in KEYS:
            remedy = hint(str(key), KEYS) or f"; valid here: {', '.join(KEYS)}"
            raise UserError(f"{path}: unknown key {key}{remedy}")
    if "like" in values and not isinstance(values["like"], str):
        raise UserError(f"{path}: like = {shown(values['like'])} must be the name of an ablation file")
    return values


def _row(name: Any, path: Path) -> str:
    """A row's name, which also names its folders."""
    if not isinstance(name, str):
        raise UserError(f"{path}: runs: the name {shown(name)} is no text to YAML; put it in quotes")
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"{path}: runs: {name!r} also names a folder; use letters, digits and _ . + - alone")
    return name


def _overrides(values: Any, where: str) -> tuple[str, ...]:
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{where} = {shown(values)} must be a list of key=value, one a line behind '- '")
    for value in values:
        _check_override(value, where)
    return tuple(values)


def _check_override(override: str, where: str) -> None:
    for key in settings_named(override):
        if key in OWN:
            raise UserError(f"{where}: override '{override}': {key} is set by {OWN[key]}")


def _seeds(values: Any, path: Path) -> list[int]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UserError(f"{path}: seeds = {shown(values)} must be a list of whole numbers, for example [0, 1, 2]")
    if len(set(values)) < len(values):
        raise UserError(f"{path}: seeds = {shown(values)} names one twice")
    return values


def _expanded(text: str, where: str) -> str:
    """The text with the values of the environment variables that it names as ${NAME}."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            raise UserError(f"{where}: '{text}': there is no environment variable {name}; export {name}=... first")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _as_text(value: str) -> str:
    """The value of an override that means this text: in quotes where YAML would read it as something else."""
    with suppress(UserError):
        if load_yaml(value, "") == value:
            return value
    return json.dumps(value, ensure_ascii=False)
