"""What the benchmarks share when they report: the terms of the loss, failures in a word, tables, charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cosa_fast.errors import UserError, first_line

# What a step reports, in the order in which results list it.
TERMS = ("loss", "cls", "cls_aux", "c2s", "c2s_aux", "s2c", "csc", "xi", "xi_aux")
OUT_OF_MEMORY = "out of memory"
COLUMNS = 100  # of a terminal


def failure(error: BaseException) -> str:
    """What went wrong, as one short line of a table: a user's mistake in its own words, anything else with its type."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return OUT_OF_MEMORY
    line, kind = first_line(error), type(error).__name__
    return line if isinstance(error, UserError) or line == kind else f"{kind}: {line}"


def number(value: float | None, form: str) -> str:
    """The value in a format such as ".1f"; "-" where there is none."""
    return "-" if value is None else f"{value:{form}}"


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table: the first `words` columns flush left, the others, which hold figures, flush right. Columns beyond
    a terminal's 100 follow below, behind the same words."""
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    blocks: list[list[int]] = [[]]
    for column in range(words, len(head)):
        shown = [*range(words), *blocks[-1], column]
        if blocks[-1] and sum(widths[each] + 2 for each in shown) - 2 > COLUMNS:
            blocks.append([])
        blocks[-1].append(column)

    def cell(column: int, text: str) -> str:
        return text.ljust(widths[column]) if column < words else text.rjust(widths[column])

    def block(columns: Sequence[int]) -> str:
        shown = [*range(words), *columns]
        return "\n".join("  ".join(cell(each, line[each]) for each in shown).rstrip() for line in (head, *lines))

    return "\n\n".join(map(block, blocks))


def print_providers(
    head: Sequence[str], providers: Mapping[str, dict[str, Any]], cells: Callable[[dict[str, Any]], list[str]]
) -> None:
    """A line of `cells` for each provider's row, the fastest first, then why others have none."""
    timed = {name: row for name, row in providers.items() if "error" not in row}
    names = sorted(timed, key=lambda name: -timed[name]["images_per_second"])
    print(aligned(["", *head], [[name, *cells(timed[name])] for name in names]))
    for name, row in providers.items():
        if "error" in row:
            print(f"{name}: failed: {row['error']}")


def save_bars(panels: Sequence[tuple[str, Mapping[str, dict[str, Any]]]], path: Path) -> None:
    """One panel of bars, images per second, for each (title, {name: row of results}); skipped, with a line that says
    so, where matplotlib is missing."""
    pyplot = plotting()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(8, 2.5 * len(panels)), squeeze=False)
    for axis, (title, rows) in zip(axes[:, 0], panels, strict=True):
        bars = {name: row["images_per_second"] for name, row in rows.items() if "error" not in row}
        axis.barh(list(bars), list(bars.values()))
        axis.set_xlabel("images per second")
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"written {path}")


def plotting() -> Any | None:
    """matplotlib.pyplot without a window; None, said in a line, where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no chart: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
