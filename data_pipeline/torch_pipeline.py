"""The portable training pipeline: PIL pixel operations, torch tensors, worker processes of torch's DataLoader."""

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.stream import Positions, SkipNotes, Unreadable, at_least, read_at
from cosa_fast.data_pipeline.views.parameters import AugmentConfig, draw
from cosa_fast.data_pipeline.views.pixels import Views, render
from cosa_fast.errors import UserError

_KILLED = (
    "a data.workers process was killed, most likely for want of memory or shared memory (/dev/shm); "
    "set data.workers lower or give more of it"
)
# Seconds after which signals are looked at, and whether a worker is dead, while there is no batch.
PATIENCE = 1.0
_FOR_PARENT = {signal.SIGINT, signal.SIGTERM}


class TorchPipeline:
    """An endless stream of augmented batches over `dataset`.

    Batch k holds the batch_size sample positions from start + k·batch_size on. Image and parameters of a position
    depend on (seed, position) alone: so the stream is the same for any number of workers, and goes on exactly where it
    ended when `start` is the number of samples already used. Rank r of `ranks` gets the r-th of equal parts of each
    batch: together the ranks see what one alone would. Iterating again begins at `start` again.
    prefetch: batches that each worker prepares ahead. pinned: in page-locked memory, on the way to a GPU.
    with_truth: also read the masks (studies only); otherwise no mask file is ever opened.
    unreadable: "stop" raises the UserError of an image that cannot be read; "skip" shows the next readable image of the
    set in its place and names the file once on stderr.
    A UserError of a worker process is raised here as the same UserError. ValueError for batch_size < 1 or a negative
    seed, start or workers.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        config: AugmentConfig,
        batch_size: int,
        seed: int,
        *,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        pinned: bool = False,
        with_truth: bool = False,
        unreadable: Unreadable = "stop",
    ) -> None:
        at_least(0, seed=seed, workers=workers)
        self._notes = SkipNotes()
        self._loader = DataLoader(
            _Samples(dataset, config, seed, with_truth, unreadable),
            batch_sampler=Positions.of(batch_size, start, rank, ranks),
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            pin_memory=pinned,
            collate_fn=_collate,
            worker_init_fn=_leave_to_parent,
            timeout=PATIENCE if workers else 0,
            # The loader draws a seed for its workers, which use none: keep that out of the global generator.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:
        problem = ""
        try:
            for batch in self._loaded():
                if isinstance(batch, _Failure):
                    problem = batch.message
                    break
                self._notes.say(batch.problems)
                yield batch.batch
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # A worker's death shows as torch's own error, or as a tensor whose sender is gone.
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(_KILLED) from error
        # Raised only here, outside the loop: its traceback would keep the loop's workers alive.
        raise UserError(problem)

    def _loaded(self) -> "Iterator[_Collated | _Failure]":
        """What the loader gives. While it is at work no handler of a signal raises: it would leave half a worker, or a
        worker without its listener, with a traceback each."""
        with _undisturbed():
            loaded = self._started()
        while True:
            with _undisturbed():
                batch = _next(loaded)
            if batch is not None:
                yield batch

    def _started(self) -> "Iterator[_Collated | _Failure]":
        """Workers are born deaf to the signals of `_FOR_PARENT`, as is every thread that a library starts in them."""
        # torch would answer the death of a worker with an error from a signal's handler, anywhere: in the middle of a
        # step, of a checkpoint, of the start of a thread. The loader finds out anyway when it waits for a batch.
        signal_handling._SIGCHLD_handler_set = True
        if self._loader.num_workers:
            _allow_open_files(self._loader.num_workers, self._loader.prefetch_factor or 0)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_PARENT)
        try:
            return iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _allow_open_files(workers: int, prefetch: int) -> None:
    """Raise the process's limit of open files to what is needed; UserError where it cannot be. It is found out here,
    for a worker that meets the limit leaves tracebacks and no batch."""
    # Pipes and locks of a worker; the shared memory of a batch's tensors; and what else is opened on the way.
    needed = len(os.listdir("/dev/fd")) + 8 * workers + 8 * prefetch + 16
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"data.workers = {workers} may need {needed} open files, and {hard} are allowed; set data.workers lower, "
            "or raise the limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _next(loaded: "Iterator[_Collated | _Failure]") -> "_Collated | _Failure | None":
    """The loader's next batch; None if it is not there within PATIENCE."""
    try:
        return next(loaded)
    except RuntimeError as error:
        if str(error).startswith("DataLoader timed out"):
            return None
        raise


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals that come meanwhile are handled afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _FOR_PARENT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for caught in came:
            signal.raise_signal(caught)


@dataclass
class _Failure:
    """A UserError on its way through the process boundary, where exceptions would arrive wrapped in a traceback."""

    message: str


@dataclass
class _Sample:
    views: Views
    labels: Tensor
    id: str
    problems: list[str]


@dataclass
class _Collated:
    batch: Batch
    problems: list[str]

    def pin_memory(self) -> "_Collated":
        """Called by the loader."""
        return _Collated(self.batch.pin_memory(), self.problems)


class _Samples(Dataset[_Sample | _Failure]):
    """Sample position -> augmented sample."""

    def __init__(
        self, dataset: ImageDataset, config: AugmentConfig, seed: int, with_truth: bool, unreadable: Unreadable
    ) -> None:
        self.dataset, self.config, self.seed, self.with_truth = dataset, config, seed, with_truth
        self.unreadable = unreadable

    def __getitem__(self, position: int) -> _Sample | _Failure:
        try:
            return self._sample(position)
        except UserError as error:
            return _Failure(str(error))

    def _sample(self, position: int) -> _Sample:
        index, image, problems = read_at(self.seed, position, len(self.dataset), self.unreadable, self.dataset.image)
        size = (image.height, image.width)
        mask = self.dataset.mask(index, size) if self.with_truth else None
        parameters = draw(self.seed, position, size, self.config)
        views = render(image, mask, parameters, self.config)
        return _Sample(views, torch.from_numpy(self.dataset.labels(index)), self.dataset.ids[index], problems)


def _collate(samples: list[_Sample | _Failure]) -> _Collated | _Failure:
    good: list[_Sample] = []
    for sample in samples:
        if isinstance(sample, _Failure):
            return sample
        good.append(sample)
    truths = [sample.views.truth for sample in good if sample.views.truth is not None]
    batch = Batch(
        weak=torch.stack([sample.views.weak for sample in good]),
        strong=torch.stack([sample.views.strong for sample in good]),
        labels=torch.stack([sample.labels for sample in good]),
        valid=torch.stack([sample.views.valid for sample in good]),
        ids=[sample.id for sample in good],
        truth=torch.stack(truths) if truths else None,
    )
    return _Collated(batch, [problem for sample in good for problem in sample.problems])


def _leave_to_parent(worker: int) -> None:
    """Ctrl-C and SIGTERM often reach the whole process group. The parent decides what they mean, saves, and ends its
    workers itself: a worker obeys SIGTERM only where its parent sent it. A lost connection is its to tell, too.
    """
    sys.excepthook = _say_unless_connection_is_lost
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_when_parent_asks, args=(os.getppid(),), daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_when_parent_asks(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _say_unless_connection_is_lost(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """The thread that hands tensors over meets the end of its parent."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)
