"""What all benchmarks print: failures in a word, tables that stand straight."""

import pytest
import torch

from bench.tables import OUT_OF_MEMORY, aligned, failure, print_providers
from cosa_fast.errors import UserError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("data.root: no folder"), "data.root: no folder"),
        (KeyError("xi"), "KeyError: 'xi'"),
        (RuntimeError("no kernel\nfor details"), "RuntimeError: no kernel"),
        (ValueError(), "ValueError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), OUT_OF_MEMORY),
    ],
)
def test_a_failure_is_one_line_with_what_matters(error: Exception, said: str) -> None:
    assert failure(error) == said


def test_words_stand_left_and_figures_right() -> None:
    table = aligned(["name", "by", "ms"], [["a", "bytes", "9.5"], ["longer", "x", "100.0"]], words=2)
    assert table.splitlines() == ["name    by        ms", "a       bytes    9.5", "longer  x      100.0"]


def test_providers_are_listed_fastest_first_and_failures_last(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"slow": {"images_per_second": 1.0}, "broken": {"error": OUT_OF_MEMORY}, "fast": {"images_per_second": 2.0}}
    print_providers(["img/s"], rows, lambda row: [f"{row['images_per_second']}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["img/s", "fast", "slow", "broken:"]
    assert lines[-1] == "broken: failed: out of memory"


def test_a_wide_table_goes_on_below_within_the_columns_of_a_terminal() -> None:
    head = ["name", *(f"column {number}" for number in range(14))]
    lines = [["one", *("1.25" for _ in head[1:])], ["another", *("12.5" for _ in head[1:])]]
    text = aligned(head, lines)
    assert max(map(len, text.splitlines())) <= 100
    blocks = [block.splitlines() for block in text.split("\n\n")]
    assert [len(block) for block in blocks] == [3, 3]
    assert [line.split()[0] for block in blocks for line in block[1:]] == ["one", "another"] * 2
    assert sum(line.count("column") for line in text.splitlines()) == 14
    assert aligned(head[:3], [line[:3] for line in lines]).count("\n") == 2
