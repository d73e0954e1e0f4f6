"""Whether two threads of a program can touch the same byte of shared memory unordered, one of them writing.

Between any two such accesses a barrier must lie on every way through the kernel, loops included; what completes later
than its instruction (asynchronous copies, matrix units) must have been waited for before that barrier. Ways are those
of the compiled code; bytes are compared thread by thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from bench.proofs.accesses import Access, Barrier, Event, Group, ProxyFence, Reader
from bench.proofs.graph import Graph
from bench.proofs.ir import read
from bench.proofs.threads import Threads

Pairs = NDArray[np.bool_]  # (threads of the first access, threads of the second)
_MANY = 15  # groups that pend at once are counted up to here


@dataclass
class Proof:
    """What was looked at, and what stays open."""

    accesses: int = 0
    barriers: int = 0
    anywhere: int = 0  # accesses of which it is not known where, and which therefore meet all others
    meeting: int = 0  # pairs of accesses that have bytes in common, one of them writing: what barriers must order
    open: list[str] = field(default_factory=list)


def prove(text: str, threads: int, warp: int, shared: int) -> Proof:
    """Of a kernel's LLVM IR, `threads` in a program, `warp` of them in a warp, and `shared` bytes that it was given."""
    program = Threads(Graph(read(text)), threads, warp)
    return Races(program, Reader(program).events, shared).proof


class Races:
    """The open pairs of a kernel's events."""

    def __init__(self, threads: Threads, events: dict[str, list[Event]], shared: int) -> None:
        self.threads, self.events = threads, events
        everything = [event for block in events.values() for event in block]
        self.accesses = [event for event in everything if isinstance(event, Access)]
        self.proof = Proof(
            len(self.accesses),
            sum(isinstance(event, Barrier) for event in everything),
            sum(access.starts is None for access in self.accesses),
        )
        number = np.arange(threads.count)
        self._same_thread = number[:, None] == number
        self._same_warp = (number[:, None] // threads.warp == number // threads.warp) & ~self._same_thread
        self._footprints = {access.number: self._footprint(access) for access in self.accesses}
        self._known: dict[tuple[int, int], Pairs] = {}
        self.proof.meeting = sum(
            not _harmless(one, other) and bool(self._footprints[one.number] & self._footprints[other.number])
            for one, other in combinations(self.accesses, 2)
        )
        self._check_bounds(shared)
        self._check_barriers()
        self._check_single()
        self._check_pairs()
        self._check_arms()
        self._check_proxies()

    def _note(self, what: str, *accesses: Access) -> None:
        line = f"{what}: " + " | ".join(access.text[:160] for access in accesses)
        if line not in self.proof.open:
            self.proof.open.append(line)

    # --- bytes --------------------------------------------------------------------------------------------------------

    def _footprint(self, access: Access) -> int:
        """A bit for every byte that some thread may touch."""
        if access.starts is None:
            return -1
        bits, width = 0, (1 << access.width) - 1
        for starts in access.starts:
            for start in np.unique(starts[access.mask]):
                bits |= width << int(max(start, 0))
        return bits

    def _meeting(self, one: Access, other: Access) -> Pairs | None:
        """Which threads of the one meet which of the other at some byte; None if none do."""
        if not self._footprints[one.number] & self._footprints[other.number]:
            return None
        key = (one.number, other.number)
        if key not in self._known:
            both = one.mask[:, None] & other.mask
            if one.starts is not None and other.starts is not None:
                meet = np.zeros_like(both)
                for first in one.starts:
                    for second in other.starts:
                        apart = second - first[:, None]
                        meet |= (apart < one.width) & (apart > -other.width)
                both &= meet
            if one.of_warp or other.of_warp:  # a lane's row may have been handed to any lane
                both = self._over_warps(both, one.of_warp, other.of_warp)
            self._known[key] = both
        return self._known[key]

    def _over_warps(self, pairs: Pairs, first: bool, second: bool) -> Pairs:
        warps, warp = self.threads.count // self.threads.warp, self.threads.warp
        split = pairs.reshape(warps, warp, warps, warp)
        if first:
            split = np.broadcast_to(split.any(1, keepdims=True), split.shape)
        if second:
            split = np.broadcast_to(split.any(3, keepdims=True), split.shape)
        return split.reshape(pairs.shape)

    # --- what must hold -----------------------------------------------------------------------------------------------

    def _check_bounds(self, shared: int) -> None:
        for access in self.accesses:
            for starts in access.starts or ():
                taken = starts[access.mask]
                if taken.size and (taken.min() < 0 or taken.max() + access.width > shared):
                    self._note(f"outside the {shared} bytes", access)

    def _check_barriers(self) -> None:
        """All threads come to the same barriers: no branch on the way to one depends on the thread."""
        graph = self.threads.graph
        for name, events in self.events.items():
            for barrier in events:
                if isinstance(barrier, Barrier):
                    relevant = self.threads.warp - 1 if barrier.of_warp else self.threads.count - 1
                    if any(self.threads.branch_bits(block) & relevant for block in graph.deciding(name)):
                        line = f"not all threads may come to a barrier: block {name}: {barrier.text}"
                        self.proof.open.append(line)

    def _check_single(self) -> None:
        """One write by several threads to one byte: they must write the same."""
        for access in self.accesses:
            if access.kind != "write":
                continue
            meeting = self._meeting(access, access)
            if meeting is None or access.of_warp:
                meeting = self._apart(access)
            one, other = np.nonzero(meeting & ~self._same_thread)
            if len(one) == 0:
                continue
            if ((one ^ other) & access.bits).any():
                self._note("several threads write different values at once", access)

    def _apart(self, access: Access) -> Pairs:
        """Rows of a matrix store that overlap."""
        meet = access.mask[:, None] & access.mask
        for first in access.starts or ():
            for second in access.starts or ():
                meet &= abs(second - first[:, None]) < access.width
        return meet & ~self._same_thread

    def _check_pairs(self) -> None:
        for name, events in self.events.items():
            for index, event in enumerate(events):
                if isinstance(event, Access):
                    for scope, other in self._unordered(event, name, index + 1):
                        self._compare(event, other, scope)

    def _compare(self, one: Access, other: Access, scope: str) -> None:
        if _harmless(one, other):
            return
        meeting = self._meeting(one, other)
        if meeting is None:
            return
        relevant = {"thread": self._same_thread, "warp": self._same_warp}.get(
            scope, ~(self._same_thread | self._same_warp)
        )
        if (meeting & relevant).any():
            self._note({"thread": "not waited for", "warp": "unordered in a warp"}.get(scope, "unordered"), one, other)

    def _check_arms(self) -> None:
        """Threads that part at a branch may be in both of its ways at once, until the ways meet again. (What comes
        later follows upon what each thread did before, which is a way as any other.)"""
        for name in self.threads.graph.order:
            bits = self.threads.branch_bits(name)
            if not bits:
                continue
            block = self.threads.graph.blocks[name]
            for scope, relevant in (("program", ~(self.threads.warp - 1)), ("warp", self.threads.warp - 1)):
                if bits & relevant:
                    meeting = self.threads.graph.meeting(name)
                    ways = [list(self._from(way, 0, scope, meeting)) for way in block.followers]
                    for place, way in enumerate(ways):
                        for other_way in ways[place + 1 :]:
                            for one in way:
                                for other in other_way:
                                    self._compare(one, other, scope)

    def _check_proxies(self) -> None:
        """What ordinary instructions write reaches the matrix units only through a fence."""
        for name, events in self.events.items():
            for index, event in enumerate(events):
                if isinstance(event, Access) and event.kind != "read":
                    for other in self._from(name, index + 1, "proxy"):
                        if (
                            other.pending in ("wgmma", "tcgen05")
                            and other.kind == "read"
                            and self._meeting(event, other) is not None
                        ):
                            self._note("no fence before the matrix units read", event, other)

    # --- ways ---------------------------------------------------------------------------------------------------------

    def _unordered(self, access: Access, name: str, index: int) -> Iterator[tuple[str, Access]]:
        """(scope, access) that may follow with no barrier between for threads of a program, or of a warp; for what
        pends also those of the same thread before it is waited for."""
        if access.pending:
            yield from self._pending(access, name, index)
            return
        for scope in ("program", "warp"):
            for other in self._from(name, index, scope):
                yield scope, other

    def _from(self, name: str, index: int, scope: str, end: str = "") -> Iterator[Access]:
        """All accesses on the ways from here up to a block and to barriers of the scope; for "proxy", up to fences."""
        seen = {end}
        todo = [(name, index)] if name != end else []
        while todo:
            block, start = todo.pop()
            for event in self.events[block][start:]:
                if isinstance(event, Access):
                    yield event
                if isinstance(event, ProxyFence) and scope == "proxy":
                    break
                if isinstance(event, Barrier) and (scope == "warp" or (scope == "program" and not event.of_warp)):
                    break
            else:
                for follower in self.threads.graph.blocks[block].followers:
                    if follower not in seen:
                        seen.add(follower)
                        todo.append((follower, 0))

    def _pending(self, access: Access, name: str, index: int) -> Iterator[tuple[str, Access]]:
        """Of an access that completes at a wait: groups ended since, whether it was waited for, and for which scopes
        it is not ordered yet."""
        seen: set[tuple[str, int, bool, bool]] = set()
        todo = [(name, index, 0, False, True)]
        while todo:
            block, start, groups, complete, in_warp = todo.pop()
            for event in self.events[block][start:]:
                if isinstance(event, Access):
                    yield "program", event
                    if in_warp:
                        yield "warp", event
                    if not complete and not (access.pending == event.pending and access.kind == event.kind):
                        yield "thread", event
                elif isinstance(event, Group) and event.name == access.pending and not complete:
                    if event.place:
                        complete = event.left is not None and groups == event.place
                        groups = groups or event.place
                    elif event.left is None:
                        groups = min(groups + 1, _MANY)
                    else:
                        complete = groups > 0 and groups - 1 >= event.left
                elif isinstance(event, Barrier) and complete:
                    if not event.of_warp:
                        break
                    in_warp = False
            else:
                for follower in self.threads.graph.blocks[block].followers:
                    state = (follower, groups, complete, in_warp)
                    if state not in seen:
                        seen.add(state)
                        todo.append((follower, 0, groups, complete, in_warp))


def _harmless(one: Access, other: Access) -> bool:
    return one.kind == other.kind and one.kind in ("read", "atomic")
