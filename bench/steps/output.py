"""What bench/throughput.py says: a table on the terminal, JSON, bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.tables import save_bars

COLUMNS = ("ms/step", "20%", "80%", "img/s", "ours is", "wait ms", "TFLOP/s", "of rate", "peak MiB")
CPU_NOTE = "Figures of a CPU compare providers within this run; they say nothing about a GPU."
ENERGY_NOTE = (
    "The baseline filters its energy on a lattice: approximate, and NumPy where the authors have C++. The step's ratio "
    "contains that."
)


def print_table(result: dict[str, Any]) -> None:
    """The providers, slowest last, with their ratio to ours."""
    rows = result["providers"]
    print(
        ", ".join(f"{key} {value}" for key, value in result.items() if isinstance(value, str | int) and key != "note")
    )
    print(" " * 28 + "".join(f"{column:>10}" for column in COLUMNS))
    for name, row in sorted(rows.items(), key=lambda item: item[1].get("ms", float("inf"))):
        if "error" in row:
            print(f"{name:28}failed: {row['error']}")
            continue
        figures = [(row[key], "10.1f") for key in ("ms", "ms_20", "ms_80", "images_per_second")]
        figures += [(row["ms"] / rows["ours"]["ms"] if "ms" in rows["ours"] else None, "10.2f")]
        figures += [(row["data_wait_ms"], "10.1f"), (row["tflop_per_second"], "10.3g")]
        figures += [(row["share_of_matrix_rate"], "10.0%"), (row["peak_mib"], "10.0f")]
        print(f"{name:28}" + "".join(_number(*figure) for figure in figures))
    if result.get("phases_ms"):
        phases = "  ".join(f"{name} {value:.1f}" for name, value in result["phases_ms"].items())
        print(f"phases of ours without capture, ms: {phases}")
    if "note" in result:
        print(result["note"])


def _number(value: float | None, form: str) -> str:
    return f"{'-':>{form.split('.')[0]}}" if value is None else f"{value:{form}}"


def save_chart(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of images per second, a panel for each result."""

    def title(result: dict[str, Any]) -> str:
        parts = (result.get("backbone", "loss path"), f"batch {result['batch_size']}", f"crop {result['crop']}")
        return ", ".join([*parts, f"{result['classes']} classes"])

    def bars(result: dict[str, Any]) -> dict[str, float]:
        return {name: row["images_per_second"] for name, row in result["providers"].items() if "ms" in row}

    save_bars([(title(result), bars(result)) for result in results], path)
