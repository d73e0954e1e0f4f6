"""What a run's folder holds, as data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosa_fast.config.reading import load_yaml
from cosa_fast.errors import UserError
from cosa_fast.evaluation.evaluated import described
from cosa_fast.evaluation.networks import NAMES_IN_FILES
from cosa_fast.files import nearest, read_json, read_text
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.log import read_log

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """name: told apart from those of the other runs. training: log.jsonl's records of steps. evaluations: those of each
    network ("on", "an"), as `evaluations` gives them. observations: run/observations.py's files, by iteration.
    pictures: the last gallery, or None.
    """

    name: str
    config: dict[str, Record]
    manifest: Record
    training: list[Record]
    evaluations: dict[str, list[Record]]
    observations: list[Record]
    pictures: Record | None

    @property
    def iteration(self) -> int:
        """The last one that anything is known of."""
        records = [*self.training, *self.evaluations["on"], *self.observations]
        return max((record["iteration"] for record in records), default=0)

    @property
    def last(self) -> Record | None:
        """The newest observation."""
        return self.observations[-1] if self.observations else None

    @property
    def has_masks(self) -> bool:
        """Whether the figures tell of the truth; else they tell of the CAM's pseudo-label."""
        return bool((self.last or {}).get("has_masks", True))

    def setting(self, section: str, key: str, default: Any = None) -> Any:
        """A value of config.yaml."""
        return _mapping(self.config.get(section)).get(key, default)


def runs_in(place: Path) -> list[Path]:
    """The folder itself, where a run is in it or none at all; else those in it that hold one, by name."""
    if RunFolder(place).config.is_file() or not place.is_dir():
        return [place]
    return sorted(path for path in place.iterdir() if RunFolder(path).config.is_file()) or [place]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders. UserError for one that holds none, or whose files cannot be read."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [_read(path, name) for path, name in zip(paths, names, strict=True)]


def _read(path: Path, name: str) -> Run:
    folder = RunFolder(path)
    if not folder.log.is_file() or not folder.config.is_file():
        lacks = f"no run (it lacks {'log.jsonl' if folder.config.is_file() else 'config.yaml'})"
        raise UserError(
            f"{path}: {lacks if path.exists() else f'no such folder{nearest(path)}'}; "
            "give a folder that a training wrote, such as runs/voc"
        )
    records = read_log(folder.log)
    observations = [record for file in sorted(folder.observed.glob("[0-9]*.json")) if (record := _observation(file))]
    return Run(
        name,
        _mapping(load_yaml(read_text(folder.config), str(folder.config))),
        _mapping(read_json(folder.manifest)) if folder.manifest.is_file() else {},
        _by_iteration([record for record in records if record.get("kind") == "train"]),
        {network: evaluations(folder, records, network) for network in NAMES_IN_FILES},
        [record for record in observations if record["iteration"] <= max(_iterations(records), default=0)],
        _pictures(folder.pictures),
    )


def evaluations(folder: RunFolder, records: list[Record], network: str) -> list[Record]:
    """Those of "on" or "an" among log.jsonl's records, one an iteration. "evaluated_on": of which images, as
    `Evaluated.evaluated_on` gives it, or what is known of that."""
    key = NAMES_IN_FILES[network]
    found = _by_iteration([record for record in records if record.get("kind") == f"eval_{key}"])
    return [{**record, "evaluated_on": _evaluated_on(folder, record, key)} for record in found]


def _evaluated_on(folder: RunFolder, record: Record, key: str) -> Record:
    """Logs from before it was logged leave the number to the observation."""
    found = _mapping(record.get("evaluated_on"))
    if not found:
        observation = _observation(folder.observation(record["iteration"])) or {}
        found = {"images": _mapping(observation.get(key)).get("images")}
    return found if isinstance(found.get("images"), int) else {}


def where(records: Sequence[Record]) -> str:
    """Which images evaluations are of, in words."""
    known = [record["evaluated_on"] for record in records]
    if not known or not all(known):
        return "validation images (how many is not recorded)"
    # Older records know less: what one of them does not say is no difference, and is not said of all.
    together = {key: value for each in known for key, value in each.items()}
    if all(each.items() <= together.items() for each in known):
        return described({key: value for key, value in together.items() if all(key in each for each in known)})
    return f"{' or '.join(dict.fromkeys(map(described, known)))}, not always the same"


def _by_iteration(records: list[Record]) -> list[Record]:
    """One record an iteration, the last that was written: a resumed run may have done some again."""
    return [found for _, found in sorted({record["iteration"]: record for record in records}.items())]


def _iterations(records: list[Record]) -> list[int]:
    return [record["iteration"] for record in records]


def _observation(file: Path) -> Record | None:
    """None where it is none: a page of the rest is better than no page."""
    with suppress(UserError):
        record = read_json(file)
        if isinstance(record, dict) and isinstance(record.get("iteration"), int):
            return record
    return None


def _pictures(file: Path) -> Record | None:
    with suppress(UserError):
        record = read_json(file) if file.is_file() else None
        return record if isinstance(record, dict) else None
    return None


def _mapping(value: Any) -> Record:
    return value if isinstance(value, dict) else {}
