"""Loading ahead with threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """For each batch of numbers the list of their `load(number)`; `threads` threads load up to `prefetch` batches
    ahead. An exception of `load` is raised in place of its batch, after all batches before it. `close()` ends the
    threads.
    """

    def __init__(self, load: Callable[[int], T], batches: Iterable[list[int]], threads: int, prefetch: int) -> None:
        self._load = load
        self._batches = iter(batches)
        self._prefetch = prefetch
        self._pool = ThreadPoolExecutor(threads, "cosa_fast data")
        self._under_way: deque[list[Future[T]]] = deque()

    def __iter__(self) -> Iterator[list[T]]:
        return self

    def __next__(self) -> list[T]:
        for batch in islice(self._batches, self._prefetch + 1 - len(self._under_way)):
            self._under_way.append([self._pool.submit(self._load, number) for number in batch])
        if not self._under_way:
            raise StopIteration
        return [future.result() for future in self._under_way.popleft()]

    def close(self) -> None:
        """End the threads. What they have begun is finished, the rest is dropped."""
        self._pool.shutdown(cancel_futures=True)
