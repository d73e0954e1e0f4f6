"""A process from which runs are forked: each is spared the seconds of a new interpreter.

Its first run takes place in it, and leaves everything imported and set up. For that, as for every other, it reads a
line of JSON from stdin, {"argv", "output", "fault", "ranks", "files", "limit"}, and answers with one when all processes
of the run have ended: {"statuses", "fault"}; a status is negative for a signal, null for a process that was still there
after `limit` seconds and was killed. `files`: the run may have so many open; null for as many as its parent.

A fault is {"signal", "to", "event", "delay", "again", "rank"}: `delay` seconds after that rank's `event`-th access to a
file the signal goes to it, to its "group" of processes, or to one "worker" of its loader; and once more `again` seconds
later if that is not null. What came of it is {"phase", "seconds"}, the time being that to the end of the run; null
where there was nothing to strike, or the run had ended before. Of the first run, "fault" is the number of accesses.
"""

import faulthandler
import io
import json
import multiprocessing
import os
import resource
import signal
import socket
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
from cosa_fast.report import curves, page
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
    """Counts a process's accesses to files, and strikes as told."""

    def __init__(self, spec: dict[str, Any] | None, report: Path) -> None:
        self._spec = spec
        self._report = report
        self._process = os.getpid()
        self._main = threading.get_ident()
        self._due = threading.Event()
        self.count = 0
        if spec is not None:
            threading.Thread(target=self._strike, daemon=True).start()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
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
        workers = [worker.pid for worker in multiprocessing.active_children()]
        if self._spec["to"] == "worker" and not workers:
            return
        target = {"process": self._process, "group": -os.getpgid(0), "worker": workers and workers[0]}[self._spec["to"]]
        # Whole or not at all: the process may come to its own end meanwhile.
        aside = self._report.with_suffix(".part")
        aside.write_text(json.dumps({"phase": self._phase(), "time": time.monotonic()}))
        aside.rename(self._report)
        number = signal.Signals[self._spec["signal"]]
        os.kill(target, number)
        if self._spec["again"] is not None:
            time.sleep(self._spec["again"])
            os.kill(target, number)

    def _phase(self) -> str:
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            if frame.f_code.co_name in PHASES and "cosa_fast" in frame.f_code.co_filename:
                return PHASES[frame.f_code.co_name]
            frame = frame.f_back
        return "exit"


def become(request: dict[str, Any], rank: int, leader: int, port: int) -> None:
    """In the process that was forked for a rank: a process group, output and arguments of its own."""
    os.setpgid(0, leader)
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, target)
    faulthandler.dump_traceback_later(request["limit"] / 2, file=2)  # where one hangs
    sys.argv = ["train", *request["argv"]]
    if request["files"] is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (request["files"], request["files"]))
    if request["ranks"] > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"], "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    if request["fault"] is not None and request["fault"]["rank"] == rank:
        Fault(request["fault"], Path(f"{request['output']}.fault"))


def waited_for(processes: list[int], limit: float) -> list[int | None]:
    """Their exit statuses. As torchrun does, the others are told to end when one has failed."""
    end = time.monotonic() + limit
    statuses: dict[int, int | None] = {}
    told = False
    while len(statuses) < len(processes):
        late = time.monotonic() > end
        for process in processes:
            if process in statuses:
                continue
            if late:
                os.kill(process, signal.SIGKILL)
            found, status = os.waitpid(process, 0 if late else os.WNOHANG)
            if found:
                statuses[process] = None if late else os.waitstatus_to_exitcode(status)
        if any(statuses.values()) and not told:
            told = True
            for process in set(processes) - set(statuses):
                os.kill(process, signal.SIGTERM)
        time.sleep(0.002)
    return [statuses[process] for process in processes]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def main() -> int:
    torch.set_num_threads(1)
    training.step_flops = lambda *_, **__: 1  # counting them takes as long as six steps
    page.SECTIONS = (("", (curves.segmentation_miou,), ()),)  # drawing all figures takes longer than the run
    tqdm.monitor_interval = 0
    # tqdm's own lock is one for all forks: a run that is killed as it holds it would hang every later one.
    tqdm.set_lock(threading.RLock())
    first = Fault(None, Path())
    with redirect_stdout(io.StringIO()):
        status = train.main(json.loads(sys.stdin.readline())["argv"])
    assert threading.active_count() == 1  # no thread, which a fork would lose
    print(json.dumps({"statuses": [status], "fault": first.count}), flush=True)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        report = Path(f"{request['output']}.fault")
        report.unlink(missing_ok=True)
        processes: list[int] = []
        port = free_port()
        for rank in range(request["ranks"]):
            processes.append(os.fork())
            if processes[-1] == 0:
                become(request, rank, processes[0], port)
                status = run_cli(train.main)
                if request["fault"] is None or request["fault"]["event"] % 3:
                    os._exit(status)  # the interpreter's own end takes as long as the run
                return status
            os.setpgid(processes[-1], processes[0])
        statuses = waited_for(processes, request["limit"])
        fault = json.loads(report.read_text()) if report.exists() else None
        if fault:
            fault["seconds"] = time.monotonic() - fault.pop("time")
        print(json.dumps({"statuses": statuses, "fault": fault}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
