"""What a run says while it trains: averages on the device, log.jsonl, TensorBoard events, and a bar or plain lines."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cosa_fast.config.schema import Config
from cosa_fast.distributed import ALONE, Ranks
from cosa_fast.errors import UserError
from cosa_fast.files import write_text
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.trackers import Trackers

_TAGS = {"eval_student": "eval_ON", "eval_teacher": "eval_AN"}


class MeanMetrics:
    """Running means of 0-d tensors, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def update(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one step's metrics."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """The means since the last read, over all ranks, on the host; starts anew."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        values = torch.stack([value.float().cpu() for value in means.values()])
        values = ranks.host_sum(values) / ranks.size
        self._sums, self._counts = {}, {}
        return dict(zip(means, values.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums, so that the next means of a resumed run are those of an undisturbed one."""
        return {"sums": {name: total.cpu() for name, total in self._sums.items()}, "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on where `state_dict()` was taken; several ranks all take the first one's."""
        self._sums = {name: total.to(device) for name, total in state["sums"].items()}
        self._counts = dict(state["counts"])


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of log.jsonl; lines that are none are left out, such as the half of one that a killed run wrote."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("iteration"), int):
                records.append(record)
    return records


def cut_log(path: Path, iteration: int, evaluated: bool) -> None:
    """Bring log.jsonl back to a checkpoint's iteration; the records of an evaluation there stay if `evaluated`."""
    if not path.is_file():
        return

    def before(record: dict[str, Any]) -> bool:
        at_checkpoint = record["iteration"] == iteration and (evaluated or record.get("kind") == "train")
        return record["iteration"] < iteration or at_checkpoint

    lines = [json.dumps(record, default=str) for record in read_log(path) if before(record)]
    write_text(path, "".join(f"{line}\n" for line in lines))


class RunLog:
    """Writes one record to every place: a line of log.jsonl, TensorBoard scalars, and the terminal. UserError where the
    disk is full."""

    def __init__(self, folder: RunFolder, config: Config, start: int) -> None:
        total = config.optim.iterations
        self._path = folder.log
        with self._written():
            self._file = folder.log.open("a", encoding="utf-8")
            self._events = SummaryWriter(str(folder.tensorboard), purge_step=start + 1 if start else None)
        self._terminal = sys.stderr.isatty()
        self._total = total
        self._bar = tqdm(total=total, initial=start, unit="it", dynamic_ncols=True, disable=not self._terminal)
        self._trackers = Trackers(config, folder, self.message)

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} and tensorboard/: cannot be written ({error.strerror or error}); "
                "free or choose another disk (run.output) and go on with --resume auto"
            ) from error

    def advance(self) -> None:
        """One iteration has ended."""
        self._bar.update()

    def record(self, iteration: int, values: Mapping[str, Any], kind: str = "train") -> None:
        """Log figures of one kind ("train", "eval_student", "eval_teacher") at an iteration, TensorBoard calls the
        latter eval_ON and eval_AN. "capture": why a run goes on without CUDA graphs."""
        line = {"kind": kind, "iteration": iteration, **values}
        with self._written():
            self._file.write(json.dumps(line, allow_nan=False, default=str) + "\n")
            self._file.flush()
            figures = {f"{_TAGS.get(kind, kind)}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
            for name, value in figures.items():
                self._events.add_scalar(name, value, iteration)
            self._events.flush()
        if figures:
            self._trackers.record(iteration, figures)

    def picture(self, iteration: int, name: str, image: Image.Image) -> None:
        """An RGB image for TensorBoard and others."""
        self._events.add_image(name, np.array(image), iteration, dataformats="HWC")
        self._trackers.picture(iteration, name, image)

    def histogram(self, iteration: int, name: str, counts: Tensor) -> None:
        """A histogram for TensorBoard: counts (bins,) of values in equal bins over [0, 1]."""
        bins = len(counts)
        centres, weights = (np.arange(bins) + 0.5) / bins, counts.double().cpu().numpy()
        total, squares = float(weights @ centres), float(weights @ centres**2)
        limits = ((np.arange(bins) + 1) / bins).tolist()
        self._events.add_histogram_raw(
            name, 0.0, 1.0, int(weights.sum()), total, squares, limits, weights.tolist(), iteration
        )

    def progress(self, iteration: int, values: Mapping[str, float], eta: float) -> None:
        """The bar's figures, or a plain line where there is no terminal."""
        shown = {"loss": f"{values['loss']:.3f}", "img/s": f"{values['images_per_second']:.1f}"}
        shown |= {label: f"{values[name]:.2f}" for name, label in (("xi", "ξ"), ("xi_aux", "ξ†")) if name in values}
        if "tflop_per_second" in values:
            shown["TFLOP/s"] = f"{values['tflop_per_second']:.3g}"
        if "peak_memory_mib" in values:
            shown["MiB"] = f"{values['peak_memory_mib']:.0f}"
        if self._terminal:
            self._bar.set_postfix(shown)
            return
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        print(f"iteration {iteration}/{self._total}  {text}  ETA {_duration(eta)}", flush=True)

    def message(self, text: str) -> None:
        """A line that must be seen."""
        self._bar.write(text)
        sys.stdout.flush()

    def close(self) -> None:
        """Flush everything."""
        self._trackers.close()
        self._bar.close()
        with self._written():
            try:
                self._events.close()
            finally:
                self._file.close()


class SilentLog(RunLog):
    """The log of a process whose run another one describes."""

    def __init__(self) -> None: ...

    def advance(self) -> None: ...

    def record(self, iteration: int, values: Mapping[str, Any], kind: str = "train") -> None: ...

    def picture(self, iteration: int, name: str, image: Image.Image) -> None: ...

    def histogram(self, iteration: int, name: str, counts: Tensor) -> None: ...

    def progress(self, iteration: int, values: Mapping[str, float], eta: float) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class StepTimer:
    """Speed, the share of time spent waiting for data, and the peak of a GPU's memory, since the last read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Forget the steps so far, and the time since then."""
        self._start = time.perf_counter()
        self._seconds_for_data = 0.0
        self._steps = 0
        self._flops: float | None = 0.0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def step_ended(self, seconds_for_data: float, flops: int | None = None) -> None:
        """Count a step that waited so long for its batch, and took so many `flops` (None: unknown)."""
        self._seconds_for_data += seconds_for_data
        self._steps += 1
        self._flops = None if self._flops is None or flops is None else self._flops + flops

    def read(self, batch_size: int, replayed_peak: int = 0) -> dict[str, float]:
        """{images_per_second, seconds_per_iteration, data_wait}; starts anew.

        Also tflop_per_second, over all ranks, where the FLOPs of all steps are known; on a GPU peak_memory_mib of this
        rank's tensors. `replayed_peak`: bytes that replays of a captured step use, which the allocator does not see.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - self._start
        figures = {
            "images_per_second": self._steps * batch_size / elapsed,
            "seconds_per_iteration": elapsed / max(self._steps, 1),
            "data_wait": self._seconds_for_data / elapsed,
        }
        if self._flops is not None:
            figures["tflop_per_second"] = self._flops / elapsed / 1e12
        if self._device.type == "cuda":
            figures["peak_memory_mib"] = max(torch.cuda.max_memory_allocated(self._device), replayed_peak) / 2**20
        self.restart()
        return figures


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
