"""The ways through a kernel: which block follows, precedes, dominates and decides about which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

from bench.proofs.ir import Block

_END = ""  # the one way out that all ends share


class Graph:
    """Of blocks in the order in which ir.read hands them out; those that nothing leads to are left out."""

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        followers = {name: block.followers for name, block in blocks.items()}
        self.order = _order(followers, next(iter(blocks)))
        self.blocks = {name: blocks[name] for name in self.order}
        self._followers = {name: followers[name] or (_END,) for name in self.order}
        self._preceding = _reversed(self._followers)
        self._dominators = _dominators(self._preceding, self.order)
        behind = _order(self._preceding, _END)
        self._postdominators = _dominators({**self._followers, _END: ()}, behind)
        self.loop_exits = cache(self._loop_exits)
        self.before_join = cache(self._before_join)
        self.deciding = cache(self._deciding)
        self._apart = cache(self._ways)
        self._loops = [self._loop(head, tail) for tail in self.order for head in self._back(tail)]

    def _back(self, tail: str) -> list[str]:
        return [head for head in self._followers[tail] if head in self._dominators[tail]]

    def _loop(self, head: str, tail: str) -> frozenset[str]:
        inside, todo = {head}, [tail]
        while todo:
            name = todo.pop()
            if name not in inside:
                inside.add(name)
                todo += self._preceding[name]
        return frozenset(inside)

    def _loop_exits(self, name: str) -> frozenset[str]:
        """The blocks from which a loop around this one can be left."""
        return frozenset(
            block
            for loop in self._loops
            if name in loop
            for block in loop
            if any(follower not in loop for follower in self._followers[block])
        )

    def _before_join(self, name: str) -> frozenset[str]:
        """The blocks whose choice decides by which way this one is reached: those whose ways meet here."""
        return frozenset(
            block
            for block in self.order
            if len(self._followers[block]) > 1
            and (self.meeting(block) == name or sum(name in ways for ways in self._apart(block)) > 1)
        )

    def _ways(self, name: str) -> tuple[frozenset[str], ...]:
        """For each way out of a block, the blocks on it before all ways meet again."""
        found, end = [], self.meeting(name)
        for follower in self._followers[name]:
            inside: set[str] = set()
            todo = [follower]
            while todo:
                block = todo.pop()
                if block not in inside and block not in (end, _END):
                    inside.add(block)
                    todo += self._followers[block]
            found.append(frozenset(inside))
        return tuple(found)

    def meeting(self, name: str) -> str:
        """The first block that lies on all ways from this one to the end; empty if that is the end."""
        below = self._postdominators[name] - {name}
        return max(below, key=lambda block: len(self._postdominators[block])) if below else _END

    def _deciding(self, name: str) -> frozenset[str]:
        """The blocks whose choice decides, directly or through others, whether this one is reached."""
        found: set[str] = set()
        todo = [name]
        while todo:
            reached = todo.pop()
            for block in self.order:
                ways = self._followers[block]
                if len(ways) < 2 or block in found:
                    continue
                certain = [reached in self._postdominators[way] for way in ways]
                # Some way leads there for sure, while the block itself does not.
                if any(certain) and (reached == block or reached not in self._postdominators[block]):
                    found.add(block)
                    todo.append(block)
        return frozenset(found)


def _order(followers: Mapping[str, Iterable[str]], entry: str) -> list[str]:
    """Reverse postorder: but for loops every block comes behind those that lead to it."""
    seen, done = {entry}, []
    stack = [(entry, iter(followers.get(entry, ())))]
    while stack:
        name, rest = stack[-1]
        for follower in rest:
            if follower not in seen:
                seen.add(follower)
                stack.append((follower, iter(followers.get(follower, ()))))
                break
        else:
            done.append(name)
            stack.pop()
    return done[::-1]


def _reversed(followers: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    preceding: dict[str, list[str]] = {name: [] for name in (*followers, _END)}
    for name, ways in followers.items():
        for follower in ways:
            preceding[follower].append(name)
    return preceding


def _dominators(preceding: Mapping[str, Iterable[str]], order: list[str]) -> dict[str, frozenset[str]]:
    """By block, the blocks on every way to it from the first of `order`, itself included."""
    every = frozenset(order)
    found = dict.fromkeys(order, every)
    found[order[0]] = frozenset(order[:1])
    changed = True
    while changed:
        changed = False
        for name in order[1:]:
            above = [found[block] for block in preceding[name] if block in found]
            now = frozenset.intersection(*above) | {name} if above else frozenset({name})
            if now != found[name]:
                found[name], changed = now, True
    return found
