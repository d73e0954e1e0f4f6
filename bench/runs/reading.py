"""What a finished run left in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from cosa_fast.config.reading import load_yaml
from cosa_fast.errors import UserError
from cosa_fast.files import read_json, read_lines, read_text
from cosa_fast.run.folder import RunFolder


class FinishedRun(NamedTuple):
    """Its log's records of training and of evaluations, in their order, its manifest and its configuration."""

    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    manifest: dict[str, Any]
    config: dict[str, Any]

    @property
    def minutes(self) -> float:
        """The time of its training steps, without evaluations; steps that were done again after an interruption count
        once."""
        ends = [record["iteration"] for record in self.training]
        spans = [end - before for end, before in zip(ends, [0, *ends], strict=False)]
        seconds = (record["seconds_per_iteration"] * span for record, span in zip(self.training, spans, strict=True))
        return sum(seconds) / 60


def read_run(path: Path) -> FinishedRun:
    """UserError for a file that is missing, or is none of a run."""
    folder = RunFolder(path)
    records = read_records(folder.log)
    training = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"].startswith("eval_")]
    manifest, config = read_json(folder.manifest), load_yaml(read_text(folder.config), str(folder.config))
    for file, found in ((folder.manifest, manifest), (folder.config, config)):
        if not isinstance(found, dict):
            raise UserError(f"{file}: is none of a run; mend the file, or leave the run out")
    return FinishedRun(training, evaluations, manifest, config)


def read_records(path: Path) -> list[dict[str, Any]]:
    """A file with a line of JSON for each record. UserError where it is missing."""
    return parse_records(read_lines(path))


def parse_records(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The records in these lines; what is none, such as a line that a killed process left unfinished, is passed
    over."""
    records = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                kind, iteration = record.get("kind"), record.get("iteration")
                records += [record] if isinstance(kind, str) and isinstance(iteration, int) else []
    return records
