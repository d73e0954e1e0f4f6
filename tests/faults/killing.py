"""Runs that are killed again and again, go on each time, and must end as the one that was left alone.

    python tests/faults/killing.py 1000 --seed 1 --json kills.json

runs tiny trainings until so many of them have been killed, and writes what came of it.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from tiny_run import TINY  # noqa: E402

from cosa_fast.data_pipeline.datasets.synthetic import generate  # noqa: E402
from cosa_fast.errors import UserError  # noqa: E402
from cosa_fast.evaluation.networks import load  # noqa: E402
from cosa_fast.run.folder import RunFolder  # noqa: E402

# What strikes, and whom.
STROKES = [
    *((number, to) for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) for to in ("process", "group")),
    (signal.SIGKILL, "worker"),
]
# Of log.jsonl: everything but the clock's.
CLOCK = ("images_per_second", "seconds_per_iteration", "data_wait", "tflop_per_second")
# For a run that nobody disturbs; and from a signal to the end.
LIMIT, OBEYED_WITHIN = 120.0, 60.0
OVERRIDES = ("optim.iterations=8", "run.checkpoint_every=2", "eval.every=5", "run.keep=3", "eval.limit=1")


@dataclass
class Ended:
    """How a run's processes ended (negative: by a signal; None: it hung), what they printed, what the fault met."""

    statuses: list[int | None]
    output: str
    fault: Any


class Nursery:
    """Runs forked from a process that has everything set up (nursery.py)."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process = process
        self._output = folder / "output.txt"

    def run(self, *argv: str, fault: dict[str, Any] | None = None, ranks: int = 1, files: int | None = None) -> Ended:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._output.write_text("", encoding="utf-8")
        request = {"argv": argv, "output": str(self._output), "fault": fault, "ranks": ranks, "files": files}
        request["limit"] = LIMIT
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return Ended(answer["statuses"], self._output.read_text(encoding="utf-8"), answer["fault"])


@contextmanager
def nursery(folder: Path) -> Iterator[Nursery]:
    """One that keeps what runs print in `folder`."""
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "nursery.py")],
        env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Nursery(process, folder)
    finally:
        process.communicate()


class Study:
    """A tiny run of one or more ranks that is killed; what it must come to is that of the undisturbed one."""

    def __init__(self, place: Nursery, folder: Path, ranks: int = 1) -> None:
        self._place = place
        self._folder = folder
        self._ranks = ranks
        generate(folder / "set", train=8, val=2, size=64, seed=1)
        values = {**TINY, "data": {**TINY["data"], "root": str(folder / "set")}}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        ended = self.start("first", 0)
        assert ended.statuses == [0]
        self._events: int = ended.fault
        if ranks > 1:
            ended = self.start("alone", 0)
            assert ended.statuses == [0] * ranks, ended.output
        self._expected = outcome(folder / ("alone" if ranks > 1 else "first"))

    def life(self, name: str, randomly: random.Random, deaths: int) -> Iterator[dict[str, Any]]:
        """Kill a run up to so many times, then let it end: a record of each kill, and of the end. `problem` is None
        where all was as it must be."""
        workers = randomly.choice((0, 2))
        for _ in range(deaths):
            fault = self._fault(randomly, workers)
            ended = self.start(name, workers, fault)
            if ended.fault is None:
                break
            begun = any(RunFolder(self._folder / name).checkpoints.glob("*.pt"))
            yield {**fault, **ended.fault, "workers": workers, "problem": wrong_end(ended, fault, begun)}
        ended = self.start(name, workers)
        problem = None if ended.statuses == [0] * self._ranks else f"statuses {ended.statuses}: {ended.output[-3000:]}"
        yield {"end": True, "problem": problem or self.difference(name)}

    def start(self, name: str, workers: int, fault: dict[str, Any] | None = None, files: int | None = None) -> Ended:
        """Begin a run of the study, or go on with it."""
        settings = (*OVERRIDES, f"run.output={self._folder}", f"run.name={name}", f"data.workers={workers}")
        command = (str(self._folder / "tiny.yaml"), *settings, "--resume", "auto")
        return self._place.run(*command, fault=fault, ranks=self._ranks, files=files)

    def _fault(self, randomly: random.Random, workers: int) -> dict[str, Any]:
        """Early events are more frequent: a run that goes on has fewer."""
        number, to = randomly.choice(STROKES if workers else STROKES[:-1])
        twice = number != signal.SIGKILL and randomly.random() < 0.3
        return {
            "signal": number.name,
            "to": to,
            "event": 1 + int(self._events * randomly.random() ** 2),
            "delay": randomly.choice((0.0, 0.02 * randomly.random(), 0.2 * randomly.random())),
            "again": 0.05 * randomly.random() if twice else None,
            "rank": randomly.randrange(self._ranks),
        }

    def difference(self, name: str) -> str | None:
        """What of a finished run is not as that of the undisturbed one; None if all is."""
        try:
            found = outcome(self._folder / name)
        except UserError as error:
            return str(error)
        wrong = [part for part, expected in self._expected.items() if not same(found[part], expected)]
        files = sorted({*found["files"]} ^ {*self._expected["files"]})
        return f"differs from the undisturbed run: {', '.join(wrong)} {files}" if wrong else None


def wrong_end(ended: Ended, fault: dict[str, Any], begun: bool) -> str | None:
    """What is not as promised of a run that was struck; None if all is. `begun`: there is a checkpoint of it."""
    phase, seconds, number = ended.fault["phase"], ended.fault["seconds"], signal.Signals[fault["signal"]]
    if None in ended.statuses:
        return f"hung: {ended.output[-3000:]}"
    if "Traceback" in ended.output or "Exception ignored" in ended.output:
        return f"a traceback: {ended.output[-2000:]}"
    if "going on from" in ended.output:
        return f"a damaged checkpoint: {ended.output[-1000:]}"
    if seconds > OBEYED_WITHIN:
        return f"took {seconds:.1f} s to end"
    lines = ended.output.count("stopped by a signal")
    finished = "written to " in ended.output
    if fault["to"] == "worker":
        # Its last batch may have been on the way; else its death is found out when the next one is waited for.
        told = ended.statuses[fault["rank"]] == 2 and "error: a data.workers process was killed" in ended.output
        return None if told or finished else f"statuses {ended.statuses}: {ended.output[-1000:]}"
    if len(ended.statuses) > 1 or number == signal.SIGKILL:
        # Who has lost a rank says so; the others are told to end by the launcher.
        wanted = {-signal.SIGKILL, 0, 2, 128 + signal.SIGTERM, 128 + number}
        wrong = lines > 1 or not set(ended.statuses) <= wanted
        return f"statuses {ended.statuses}: {ended.output[-1000:]}" if wrong else None
    if "error:" in ended.output:
        return f"an error: {ended.output[-1000:]}"
    # As long as the configuration is not read, nobody knows of the checkpoint.
    wanted = {128 + number} if not begun else {0, 128 + number} if phase == "command line" else {0}
    if not set(ended.statuses) <= wanted and not (finished and ended.statuses == [0]):
        return f"statuses {ended.statuses} in place of {wanted}: {ended.output[-1000:]}"
    if lines != 1 and not finished:
        return f"{lines} lines about the signal: {ended.output[-1000:]}"
    return None


def outcome(path: Path) -> dict[str, Any]:
    """What a finished run has come to: states without settings and clock, log without the clock, results, names."""
    folder = RunFolder(path)
    lines = [json.loads(line) for line in folder.log.read_text(encoding="utf-8").splitlines()]
    # One that was told to stop has left a checkpoint of that iteration, too.
    passing = {*folder.numbered()[:-1], *folder.tensorboard.iterdir()}

    def state(file: Path) -> dict[str, Any]:
        return {key: value for key, value in load(file).items() if key != "config"}

    return {
        "last checkpoint": state(folder.numbered()[-1]),
        "best.pt": state(folder.best),
        "log.jsonl": [{key: value for key, value in line.items() if key not in CLOCK} for line in lines],
        "results.json": json.loads(folder.results.read_text(encoding="utf-8")),
        "gallery.png": folder.gallery.read_bytes(),
        "files": sorted(str(file.relative_to(path)) for file in {*path.rglob("*")} - passing),
    }


def same(a: Any, b: Any) -> bool:
    """Equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def kills_of(study: Study, count: int, randomly: random.Random) -> list[dict[str, Any]]:
    """The records of as many kills, and of the ends of the runs that they happened to."""
    records: list[dict[str, Any]] = []
    killed = 0
    while killed < count:
        name = f"life{len(records)}"
        for record in study.life(name, randomly, min(4, count - killed)):
            killed += "end" not in record
            records.append({"run": name, **record})
    return records


def kill(count: int, seed: int, folder: Path, ranks: int = 1) -> list[dict[str, Any]]:
    """`kills_of` a study that is made for it."""
    with nursery(folder) as place:
        return kills_of(Study(place, folder, ranks), count, random.Random(seed))


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of what happened, and every problem in full."""
    kills = [record for record in records if "end" not in record]
    return {
        "kills": len(kills),
        "runs": len(records) - len(kills),
        "by signal": dict(Counter(f"{record['signal']} to a {record['to']}" for record in kills)),
        "by phase": dict(Counter(record["phase"] for record in kills)),
        "with loader workers": sum(record["workers"] > 0 for record in kills),
        "twice in a row": sum(record["again"] is not None for record in kills),
        "longest to obey, s": max((r["seconds"] for r in kills if r["signal"] != "SIGKILL"), default=0.0),
        "problems": [record for record in records if record["problem"]],
    }


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill tiny runs, and compare what becomes of them.")
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run, on one machine")
    parser.add_argument("--json", type=Path, help="write the summary there")
    return parser.parse_args(argv)


def main() -> int:
    arguments = parsed()
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        found = summary(kill(arguments.kills, arguments.seed, Path(folder), arguments.ranks))
    minutes = round((time.time() - began) / 60, 1)
    text = json.dumps({"seed": arguments.seed, "ranks": arguments.ranks, "minutes": minutes, **found}, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
