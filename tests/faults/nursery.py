"""A process from which runs are forked: each is spared the seconds of a new interpreter.

Its first run takes place in it, and leaves everything imported and set up. For that, as for every other, it reads a
line of JSON from stdin, {"argv", "output", "fault", "limit"}, and answers with one when the run has ended: {"status",
"fault"}. A fault is {"signal", "event", "delay", "group", "again"}: the run gets the signal `delay` seconds after its
`event`-th access to a file (or its whole process group does), and once more `again` seconds later if that is not null.
What came of it is {"phase", "seconds"}, the time being that to the end of the run; null where the run had ended before.
Of the first run, "fault" is the number of these accesses.
"""

import io
import json
import os
import signal
import sys
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cosa_fast import train
from cosa_fast.cli import run_cli
from cosa_fast.run import training

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir", "os.listdir", "os.truncate"}
# The innermost of these functions on the main thread's stack says what a run is doing.
PHASES = {
    "finish": "last writes",
    "evaluate": "evaluation",
    "_save": "checkpoint",
    "_loop": "training",
    "train": "start-up",
    "run_cli": "command line",
}


class Fault:
    """Counts a run's accesses to files, and strikes as told."""

    def __init__(self, spec: dict[str, Any] | None, report: Path) -> None:
        self._spec = spec
        self._report = report
        self._process = os.getpid()
        self._main = threading.get_ident()
        self._due = threading.Event()
        self.count = 0
        if spec is not None:
            threading.Thread(target=self._strike, daemon=True).start()

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or os.getpid() != self._process:
            return
        self.count += 1
        if self._spec is not None and self.count == self._spec["event"]:
            self._due.set()
            if not self._spec["delay"]:
                time.sleep(1)  # at this very point, then

    def _strike(self) -> None:
        assert self._spec is not None
        self._due.wait()
        time.sleep(self._spec["delay"])
        self.count += 10**9  # the report is no event
        self._report.write_text(json.dumps({"phase": self._phase(), "time": time.monotonic()}))
        self._send()
        if self._spec["again"] is not None:
            time.sleep(self._spec["again"])
            self._send()

    def _send(self) -> None:
        assert self._spec is not None
        if self._spec["group"]:
            os.killpg(0, self._spec["signal"])
        else:
            os.kill(self._process, self._spec["signal"])

    def _phase(self) -> str:
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            if frame.f_code.co_name in PHASES and "cosa_fast" in frame.f_code.co_filename:
                return PHASES[frame.f_code.co_name]
            frame = frame.f_back
        return "exit"


def born(request: dict[str, Any]) -> int:
    """The run, in the process that was forked for it; returns its exit status."""
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, target)
    sys.argv = ["train", *request["argv"]]
    fault = Fault(request["fault"], Path(f"{request['output']}.fault"))
    sys.addaudithook(fault.hook)
    return run_cli(train.main)


def waited_for(process: int, limit: float) -> int | None:
    """The exit status, negative for a signal; None if the process did not end in time and was killed."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def main() -> int:
    torch.set_num_threads(1)
    training.step_flops = lambda *_, **__: 1  # counting them takes as long as six steps
    tqdm.monitor_interval = 0
    first = Fault(None, Path())
    sys.addaudithook(first.hook)
    with redirect_stdout(io.StringIO()):
        status = train.main(json.loads(sys.stdin.readline())["argv"])
    assert threading.active_count() == 1  # no thread, which a fork would lose
    print(json.dumps({"status": status, "fault": first.count}), flush=True)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        report = Path(f"{request['output']}.fault")
        report.unlink(missing_ok=True)
        process = os.fork()
        if process == 0:
            return born(request)
        status = waited_for(process, request["limit"])
        fault = json.loads(report.read_text()) if report.exists() else None
        if fault and "time" in fault:
            fault["seconds"] = time.monotonic() - fault.pop("time")
        print(json.dumps({"status": status, "fault": fault}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
