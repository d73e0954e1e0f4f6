"""Several processes that train one network, one per device, as torchrun starts them.

Every loss is a sum over the whole batch divided by a normaliser of the whole batch. A rank computes its own share of
the sum over the normaliser of all ranks, so that losses and gradients only have to be added up.
"""

import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from cosa_fast.errors import QuietError, UserError, counted, first_line

T = TypeVar("T")

# A rank that fails takes the others along at once; this only bounds how long a hung one is waited for.
TIMEOUT = timedelta(minutes=10)
# For all processes to start and to find each other.
TIME_TO_MEET = timedelta(minutes=5)
START_WITH = "start the processes with torchrun, or unset RANK"


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank 0..size−1. The default is a process alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs, checkpoints and results."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place; nothing to do alone."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: int) -> int:
        """The largest value that any rank has; waits for all of them."""
        if self.size == 1:
            return value
        agreed = torch.tensor(value)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=_host_group())
        return int(agreed)

    def host_sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks of a tensor on the CPU."""
        if self.size > 1:
            dist.all_reduce(values, group=_host_group())
        return values

    def together(self, action: Callable[[], T]) -> T:
        """The result of an action that every rank takes. Where it fails on some, all fail: the first rank that has a
        UserError says it, the others end quietly."""
        result, error = None, None
        try:
            result = action()
        except UserError as failure:
            error = failure
        speaker = self.agree(0 if error is None else self.size - self.rank)
        if speaker == 0:
            return cast(T, result)
        if error is not None and speaker == self.size - self.rank:
            raise error
        raise QuietError("said by another process")

    def share(self, batch_size: int, parts: int = 1) -> int:
        """Images of this rank in a batch of `batch_size`; UserError unless they, and these in `parts`, can be shared
        out evenly."""
        if batch_size % self.size:
            raise UserError(
                f"optim.batch_size = {batch_size} cannot be shared by {self.size} processes; "
                "give a multiple of --nproc-per-node × --nnodes"
            )
        own = batch_size // self.size
        if own % parts:
            raise UserError(
                f"optim.accumulate = {parts} must divide the {counted(own, 'image')} that each process has of a batch"
            )
        return own


ALONE = Ranks()


class Releasing(Protocol):
    """What may hold collective operations on the device, in a CUDA graph."""

    def release(self) -> None:
        """Wait for the device, and let go of them."""


_holders: "weakref.WeakSet[Releasing]" = weakref.WeakSet()


def release_before_end(holder: Releasing) -> None:
    """Have `holder` released before the process group ends, which would otherwise wait for it; `holder` is not kept."""
    _holders.add(holder)


_hosts: dist.ProcessGroup | None = None


def _host_group() -> dist.ProcessGroup:
    """A group over the hosts' own network: what the hosts agree on does not wait for a GPU."""
    global _hosts
    if _hosts is None:
        _hosts = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return _hosts


# What gloo, NCCL and the store say when the other side of a connection is no longer there.
_PEER_IS_GONE = (
    "closed by peer",
    "closed by remote peer",
    "reset by peer",
    "broken pipe",
    "connection refused",
    "pair closure",
    "remote process exited",
    "ncclremoteerror",
    "collective operation timeout",
)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process has gone, rather than for want of memory or a wrong
    call."""
    text = str(error).lower()
    return isinstance(error, dist.DistNetworkError | dist.DistStoreError) or any(word in text for word in _PEER_IS_GONE)


@contextmanager
def ranks_of_launch(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun's environment describes, with the process group open inside; alone without torchrun.
    UserError where another of them ends in the middle.

    `device`: "auto", "cpu" or "cuda", as in run.device; each process takes the GPU of its local rank.
    """
    if "RANK" not in os.environ or _number("WORLD_SIZE", "1") == 1:
        yield ALONE
        return
    ranks = Ranks(_number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK"))
    if ranks.rank >= ranks.size:
        raise UserError(f"RANK={ranks.rank} of WORLD_SIZE={ranks.size}: {START_WITH}")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node: process {ranks.local_rank + 1} of this machine has no GPU; "
                f"there are {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(ranks.local_rank)
    _meet(ranks, "nccl" if on_gpu else "gloo")
    global _hosts
    try:
        yield ranks
    except BaseException as error:
        # Not destroyed: where a rank is lost, that may wait for it. The process ends, and its groups with it.
        _hosts = None
        if isinstance(error, RuntimeError) and is_lost_rank(error):
            raise UserError(
                "another process of this run has ended; see its own message above. The last checkpoint is whole: "
                "go on with --resume auto"
            ) from error
        raise
    for holder in list(_holders):
        holder.release()
    _hosts = None
    dist.destroy_process_group()


def _number(name: str, default: str | None = None) -> int:
    """A number that torchrun put into the environment."""
    text = os.environ.get(name, default)
    if text is None or not text.isascii() or not text.isdecimal():
        raise UserError(f"{name} in the environment is {'missing' if text is None else repr(text)}: {START_WITH}")
    return int(text)


def _meet(ranks: Ranks, backend: str) -> None:
    """Open the process group. UserError where the processes do not find each other in time."""
    if not os.environ.get("MASTER_ADDR"):
        raise UserError(f"MASTER_ADDR in the environment is missing: {START_WITH}")
    _number("MASTER_PORT")
    where = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
    try:
        store, rank, size = _found(ranks)
        store.set_timeout(TIME_TO_MEET)
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)
        _host_group()
        store.set_timeout(TIMEOUT)
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(
            f"{where}: the {ranks.size} processes did not meet within {TIME_TO_MEET.total_seconds():.0f} s "
            f"({first_line(error, 120)}); see that all are started, the address is right and the port free"
        ) from error


def _found(ranks: Ranks) -> tuple[dist.Store, int, int]:
    """The store over which the processes meet, rank, size. In a thread: torch itself waits for ever for a listener that
    accepts the connection and says nothing."""
    found: Future[tuple[dist.Store, int, int]] = Future()

    def look() -> None:
        try:
            found.set_result(next(dist.rendezvous("env://", ranks.rank, ranks.size, timeout=TIME_TO_MEET)))
        except BaseException as error:
            found.set_exception(error)

    Thread(target=look, daemon=True).start()
    # Torch's own message says more, where it gives up by itself.
    return found.result(TIME_TO_MEET.total_seconds() + 1)
