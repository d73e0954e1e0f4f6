"""Where the time of a step goes: torch.profiler around a few iterations of a run."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from cosa_fast.errors import UserError, counted
from cosa_fast.files import write_text
from cosa_fast.run.folder import RunFolder

# The first iterations of a start are left out: they initialise and compile. One more warms the profiler itself up; the
# capture of a CUDA graph is over by then.
SKIPPED = 3
ROWS = 30


def check_iterations(iterations: int | None) -> None:
    """UserError unless there is something to profile (None: no profile was asked for)."""
    if iterations is not None and iterations < 1:
        raise UserError(f"--profile {iterations}: give the number of iterations to profile, at least 1")


class StepProfiler:
    """Profiles `iterations` steps (None: does nothing) and leaves a trace and a table of what took the most time in the
    run's folder.

    Evaluations and checkpoints between these steps are part of the profile. A run that ends early leaves what there is.
    """

    def __init__(self, iterations: int | None, folder: RunFolder, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._steps = 0
        self._profile: profile | None = None
        if iterations is not None:
            plan = schedule(skip_first=SKIPPED, wait=0, warmup=1, active=iterations, repeat=1)
            self._last = SKIPPED + 1 + iterations
            self._profile = profile(activities=_activities(), schedule=plan, on_trace_ready=self._write)
            self._profile.start()

    def step(self) -> None:
        """One iteration has ended."""
        if self._profile is None:
            return
        self._steps += 1
        self._profile.step()
        if self._steps == self._last:
            self.close()

    def close(self) -> None:
        """Stop, if the profile still runs."""
        running, self._profile = self._profile, None
        if running is None:
            return
        running.stop()
        if self._steps <= SKIPPED + 1:
            self._say(f"no profile: the run ended within the {SKIPPED + 1} iterations that a profile leaves out")

    def _write(self, profiled: profile) -> None:
        if self._steps <= SKIPPED + 1:
            return  # stopped as the first recorded step would have begun
        trace, top = self._folder.trace, self._folder.top
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(trace))
        own_time = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiled.key_averages().table(sort_by=own_time, row_limit=ROWS, max_name_column_width=80)
        write_text(top, table + "\n")
        count = min(self._steps, self._last) - SKIPPED - 1
        self._say(f"profile of {counted(count, 'iteration')}: {top}, and {trace} for ui.perfetto.dev")


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
