"""Trains the runs of a matrix, each in a process and a folder of its own, and gathers what they scored.

A run that is finished is kept, one that was interrupted goes on from its newest checkpoint, one that fails harms no
other. So the same command, given again, does what is left.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from bench.runs import averages
from bench.runs.matrix import Matrix, Run
from bench.runs.reading import parse_records, read_run
from cosa_fast.config.parsing import config_to_dict, saved_config
from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError
from cosa_fast.evaluation.networks import NAMES_IN_FILES
from cosa_fast.files import read_json, write_json, write_text
from cosa_fast.run.signals import STOPPING

ROOT = Path(__file__).resolve().parents[2]
# Settings that do not change what a run learns: a finished run is kept although they differ.
HARMLESS = {
    "run": ("name", "output", "device", "threads", "log_every", "checkpoint_every", "keep"),
    "data": ("workers", "prefetch"),
}
TRAIN = ("-m", "cosa_fast.train")
POLL_SECONDS = 0.2


def state(run: Run) -> str:
    """ "finished", "resume at N" (of whose checkpoints the newest has N iterations) or "new". UserError if the folder
    holds a run with other settings, or with settings that nobody knows."""
    folder = run.folder
    if not folder.config.is_file():
        if folder.kept():
            raise UserError(
                f"{folder.path}: holds a run without its config.yaml, whose settings may be others; remove the folder, "
                "or give another --output"
            )
        return "new"
    changed = _changed(saved_config(folder.config), run.config)
    if changed:
        raise UserError(
            f"{folder.path}: holds a run with other settings ({changed}); remove the folder, or give another --output"
        )
    if _is_finished(run):
        return "finished"
    checkpoints = folder.numbered()
    return f"resume at {int(checkpoints[-1].stem)}" if checkpoints else "new"


def states(runs: Sequence[Run]) -> list[str]:
    """`state` of each run. The UserError names all folders that are refused, so that they can be dealt with at once."""
    found: list[str] = []
    refused: dict[Path, str] = {}
    for run in runs:
        try:
            found.append(state(run))
        except UserError as error:
            refused[run.folder.path] = str(error)
    if refused:
        first, *others = refused
        raise UserError(refused[first] + (f" (refused as well: {', '.join(map(str, others))})" if others else ""))
    return found


def _is_finished(run: Run) -> bool:
    """Whether the results of its last iteration are there. Damaged ones do not count: a resumed run evaluates anew."""
    with suppress(UserError):
        results = read_json(run.folder.results)
        if not isinstance(results, dict) or results.get("iteration") != run.config.optim.iterations:
            return False
        scores = [results.get(name, {}) for name in NAMES_IN_FILES.values()]
        return all(isinstance(own, dict) and all(map(_is_figure, own.values())) for own in scores)
    return False


def _is_figure(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _changed(old: Config, new: Config) -> str:
    before, after = config_to_dict(old), config_to_dict(new)
    return "; ".join(
        f"{section}.{key}: {before[section][key]} -> {value}"
        for section, values in after.items()
        for key, value in values.items()
        if before[section][key] != value and key not in HARMLESS.get(section, ())
    )


def command(run: Run) -> list[str]:
    """What trains the run from where it stands."""
    # Without a checkpoint the run starts over; what it has logged so far goes.
    begin = ["--resume", "auto"] if run.folder.numbered() else ["--overwrite"]
    return [sys.executable, *TRAIN, *run.settings, *begin]


def print_plan(runs: Sequence[Run]) -> None:
    """What would be done: a line for each run."""
    for run, now in zip(runs, states(runs), strict=True):
        print(f"{run}: {now}" if now == "finished" else f"{run}: {now}: {shlex.join(command(run))}")


def places(jobs: int, runs: Sequence[Run]) -> list[dict[str, str]]:
    """The environment of each of so many runs at a time: its GPU, where there are some, and its share of the cores."""
    common = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    common["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    if jobs > 1:
        common["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    count = 0 if all(run.config.run.device == "cpu" for run in runs) else torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    return [common | ({"CUDA_VISIBLE_DEVICES": names[job % count]} if count else {}) for job in range(jobs)]


@dataclass
class _Job:
    """A run at work, in one of the places."""

    run: Run
    place: int
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    begin: int  # of what this process prints, in the file
    bar: tqdm = field(repr=False)

    def show(self) -> None:
        """Move the bar to the last iteration that the run has logged."""
        if not self.bar.disable:
            self.bar.update(_logged_iteration(self.run.folder.log) - self.bar.n)


@contextmanager
def _owned(folder: Path) -> Iterator[int]:
    """Have the folder of all runs to oneself. Yields the lock's descriptor, which the runs inherit: one that outlives a
    killed ablation keeps it. UserError if it is taken, or no file can be made there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another --output") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another ablation, or a run that a killed one left behind, is at work there; wait for it, "
                "end it, or give another --output"
            ) from None
        yield file.fileno()


def _start(run: Run, place: int, environment: dict[str, str], lock: int) -> _Job:
    argv, path = command(run), _output(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Appended to: what an earlier part of the run said is part of its story.
    output = path.open("ab")
    begin = output.tell()
    # A session of its own, so that Ctrl-C reaches this process alone, which then lets the runs save.
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment,
        start_new_session=True, pass_fds=(lock,),
    )  # fmt: skip
    total = run.config.optim.iterations
    bar = tqdm(total=total, desc=str(run), position=place, unit="it", leave=False, dynamic_ncols=True, disable=None)
    return _Job(run, place, process, output, begin, bar)


def train_all(matrix: Matrix, jobs: int, after_each: Callable[[], object]) -> list[str]:
    """Bring every run to its end, `jobs` at a time; a line for each. Returns what went wrong with the others.

    `after_each` is called before the first of them begins, and after each that has come to its end. KeyboardInterrupt,
    or SIGTERM, which becomes one, stops: the runs at work have then saved their state. UserError if another ablation is
    at work in the folder.
    """
    with _owned(matrix.runs[0].folder.path.parent) as lock:
        return _train_all(matrix, jobs, after_each, lock)


def _train_all(matrix: Matrix, jobs: int, after_each: Callable[[], object], lock: int) -> list[str]:
    waiting: list[tuple[int, Run]] = []
    failures: list[str] = []
    for number, (run, now) in enumerate(zip(matrix.runs, states(matrix.runs), strict=True), 1):
        if now == "finished":
            _say(matrix, number, run, f"kept: {_scores(run)}")
        else:
            waiting.append((number, run))
    after_each()
    jobs = min(jobs, len(matrix.runs))
    environments = places(jobs, matrix.runs)
    free = list(range(jobs))
    active: dict[int, _Job] = {}
    with _terminating(active) as told:
        while waiting or active:
            if told:
                raise KeyboardInterrupt
            while free and waiting:
                number, run = waiting.pop(0)
                place = free.pop(0)
                active[number] = _start(run, place, environments[place], lock)
            time.sleep(POLL_SECONDS)
            for number, job in list(active.items()):
                job.show()
                if job.process.poll() is None:
                    continue
                del active[number]
                free.append(job.place)
                failure = _end(job)
                _say(matrix, number, job.run, failure or _scores(job.run))
                if failure is None:
                    after_each()
                else:
                    failures.append(f"{job.run}: {failure}")
    return failures


def _end(job: _Job) -> str | None:
    """What went wrong with a run whose process has ended; None if it is finished."""
    job.bar.close()
    job.output.close()
    status = job.process.returncode
    if status == 0:
        return None if _is_finished(job.run) else "stopped by a signal, its state saved"
    with _output(job.run).open("rb") as file:
        file.seek(job.begin)
        lines = file.read().decode("utf-8", "replace").split("\n")
    said = [line.strip() for line in lines if line.strip()] or [f"exit status {status}"]
    if status < 0:  # whatever it printed last is not the reason
        said = [f"killed by signal {-status}{', perhaps for want of memory' * (-status == signal.SIGKILL)}"]
    return f"failed ({said[-1]}); see {_output(job.run)}"


@contextmanager
def _terminating(active: dict[int, _Job]) -> Iterator[list[int]]:
    """Whatever ends the block early, the runs at work get SIGTERM and the time to save.

    Yields the numbers of the SIGTERMs and Ctrl-Cs that have come. They are looked at, not raised: one that comes while
    a run is being started would leave it behind, and one that comes while the runs save would leave them all.
    """
    told: list[int] = []
    before = {number: signal.signal(number, lambda number, _: told.append(number)) for number in STOPPING}
    try:
        yield told
    finally:
        for job in active.values():
            job.process.terminate()
        for job in active.values():
            job.bar.close()
            job.process.wait()
            job.output.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(matrix: Matrix, number: int, run: Run, text: str) -> None:
    total = len(matrix.runs)
    tqdm.write(f"[{number:{len(str(total))}}/{total}] {run}: {text}")
    sys.stdout.flush()


def _output(run: Run) -> Path:
    """What the run's processes print."""
    return run.folder.path / "output.txt"


def _logged_iteration(path: Path) -> int:
    """The last iteration in a log that is being written; 0 before there is one."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 10_000))
        records = parse_records(file.read().decode("utf-8", "replace").split("\n"))
        return int(records[-1]["iteration"]) if records else 0
    return 0


def figures(run: Run) -> dict[str, dict[str, float]]:
    """{"an": ..., "on": ...}: what a finished run scored, from its last evaluation. A segmentation that was never
    trained (classification only) has no scores, nor has ON beside a standalone network, which stands in AN's place."""
    results = read_json(run.folder.results)
    trained = run.config.model.standalone or run.config.optim.cotrain_after < run.config.optim.iterations
    return {
        name: {
            figure: value
            for figure, value in results.get(NAMES_IN_FILES[name], {}).items()
            if value is not None and (trained or "seg_" not in figure)
        }
        for name in ("an", "on")
    }


def _scores(run: Run) -> str:
    """AN's headline figures and the time of the training steps."""
    own = figures(run)["an"]
    names = {
        "seg_label_free": "label-free",
        "seg_label_aware": "label-aware",
        "cam_best": "CAM",
        "image_ap": "image AP",
    }
    said = ", ".join(f"{label} {own[figure]:.1f}" for figure, label in names.items() if figure in own)
    return f"{said} ({read_run(run.folder.path).minutes:.1f} min)"


def gather(matrix: Matrix) -> tuple[averages.Results, averages.Results, dict[str, Any]]:
    """The figures of AN and of ON of all finished runs, and everything together as it goes into JSON."""
    an: dict[str, dict[int, dict[str, float]]] = {row: {} for row in matrix.rows}
    on: dict[str, dict[int, dict[str, float]]] = {row: {} for row in matrix.rows}
    seeds: dict[str, dict[int, Any]] = {row: {} for row in matrix.rows}
    machine: dict[str, Any] = {}
    missing: list[str] = []
    for run in matrix.runs:
        if state(run) != "finished":
            missing.append(str(run))
            continue
        own, left = figures(run), read_run(run.folder.path)
        an[run.row][run.seed], on[run.row][run.seed] = own["an"], own["on"]
        facts = {"commit": left.manifest.pop("commit", None), "minutes": round(left.minutes, 1)}
        resumed = len(left.manifest.pop("before", []))
        seeds[run.row][run.seed] = facts | ({"resumed": resumed} if resumed else {}) | own
        machine = machine or {key: value for key, value in left.manifest.items() if key not in ("seed", "iteration")}
    averaged = {"an": averages.as_json(an), "on": averages.as_json(on)}
    rows = {
        row: {"overrides": list(overrides), "seeds": seeds[row], "an": averaged["an"][row], "on": averaged["on"][row]}
        for row, overrides in matrix.rows.items()
    }
    result = {
        "matrix": matrix.name, "base": matrix.base, "overrides": list(matrix.overrides), "seeds": list(matrix.seeds),
        "machine": machine, "missing": missing, "runs": rows,
    }  # fmt: skip
    return an, on, result


def report(matrix: Matrix, out: Path) -> str:
    """Write the tables of what is finished beside `out`, which gets the JSON: .txt and .md. Returns the text."""
    an, on, result = gather(matrix)
    tables = averages.tables(an, on)
    text = "\n\n".join(table.text() for table in tables) + "\n"
    write_json(out, result)
    write_text(out.with_suffix(".txt"), text)
    write_text(out.with_suffix(".md"), "\n\n".join(table.markdown() for table in tables) + "\n")
    return text


def save_chart(matrix: Matrix, out: Path) -> None:
    """The chart of what is finished, beside `out`."""
    averages.save_chart(averages.means(gather(matrix)[0]), out.with_suffix(".png"), matrix.name)
