"""Says at the end of a deep run how many calls were tried."""

from typing import Any

from fuzz.oracle import DEEP, counts


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if DEEP:
        results, refusals = counts["results"], counts["refusals"]
        line = f"{results + refusals} calls held to the oracle: {results} results, {refusals} refusals"
        terminalreporter.write_line(line)
