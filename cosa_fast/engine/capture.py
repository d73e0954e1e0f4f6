"""One phase's step as a CUDA graph: a few ordinary steps, the last of them watched, then the capture and its replays.

A captured step does not know its engine, which hands it the step to run at every call: engine and graph make no cycle,
so that the graph, and the collective operations in it, go when the engine lets go of them.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.errors import first_line
from cosa_fast.kernels.launch.runtime import HAS_TRITON

# Steps of a phase before its capture: lazy initialisation and compilation must be over.
WARM_UP = 3

Run = Callable[[Batch], dict[str, Tensor]]


class NotCaptured(Exception):
    """A step that cannot be captured; the message says why. Nothing of this call has reached the parameters."""


def captures(config: Config, device: torch.device) -> bool:
    """Whether steps are to be captured."""
    return device.type == "cuda" and left_out(config, device) is None


def left_out(config: Config, device: torch.device) -> str | None:
    """Why a GPU's steps are not to be captured: a setting, or what needs the host in a step: the oracles of the
    guidance ablation, plain kernels, and recomputed blocks (they save the state of the random generators, which a
    capture forbids). None where they are, and on a CPU, which has no graphs."""
    if device.type != "cuda":
        return None
    reasons = {
        "run.capture=off": config.run.capture == "off",
        f"loss.guidance={config.loss.guidance}": config.loss.guidance != "teacher",
        "run.backend=reference": config.run.backend == "reference",
        "Triton is not installed": not HAS_TRITON,
        "model.checkpoint_blocks=true": config.model.checkpoint_blocks,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


class CapturedStep:
    """A phase's step, which replays what it once was. `peak`: bytes that it used, once captured."""

    def __init__(self, cotraining: bool, device: torch.device) -> None:
        self.cotraining = cotraining
        self.peak = 0
        self._device = device
        self._steps = 0
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch
        self._metrics: dict[str, Tensor]

    @property
    def captured(self) -> bool:
        """Whether the next call is a replay."""
        return self._graph is not None

    def __call__(self, run: Run, batch: Batch) -> dict[str, Tensor]:
        """The metrics of `run(batch)`; those of a replay are overwritten by the next one. NotCaptured if that step
        waits for the device, or its capture fails: the caller must do this step again."""
        if self._steps < WARM_UP:
            self._steps += 1
            return self._run_aside(run, batch, watched=self._steps == WARM_UP)
        if self._graph is None:
            self._capture(run, batch)
        self._batch.copy_(batch)
        assert self._graph is not None
        self._graph.replay()
        return self._metrics

    def _run_aside(self, run: Run, batch: Batch, watched: bool) -> dict[str, Tensor]:
        """On the stream of the capture, where autograd's nodes will expect to be."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), _watched(watched):
            metrics = run(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return metrics

    def _capture(self, run: Run, batch: Batch) -> None:
        self._batch = batch.map(torch.clone)
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread only: what loads data may allocate memory or ask for events meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._metrics = run(self._batch)
        except Exception as error:  # of any kind: whatever it is, the step works without a graph
            _clean_up_after_a_failed_capture(self._device)
            raise NotCaptured(first_line(_cause(error))) from error
        self._graph = graph
        # Its memory stays with the graph, and no statistics of the allocator show it again.
        self.peak = torch.cuda.max_memory_allocated(self._device)


@contextmanager
def _watched(watched: bool) -> Iterator[None]:
    """Inside, waiting for the device is NotCaptured: found before a capture, which it would leave half done."""
    if not watched:
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        raise NotCaptured(f"a step waits for the device ({_place(error)})") from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _place(error: BaseException) -> str:
    """The innermost place outside of torch that an error came from: "file.py:line"."""
    place, trace = "?", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/torch/" not in code.co_filename:
            place = f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _cause(error: BaseException) -> BaseException:
    """The error that came first: the end of a capture that has failed raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _clean_up_after_a_failed_capture(device: torch.device) -> None:
    """Wait, and free the random generator of the mark that it is being captured: random layers would refuse to run."""
    torch.cuda.synchronize(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())
