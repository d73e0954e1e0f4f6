"""Results of the kernel benchmark on the terminal, as JSON, CSV and a plot; and the machine that they are of."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.operators.scene import Size
from bench.tables import aligned, number, plotting
from cosa_fast.files import write_json, written_aside
from cosa_fast.run import manifest

Row = dict[str, Any]
COLOURS = {"ours": "C2", "eager": "C7", "compiled": "C0"}


def machine(device: torch.device) -> Row:
    """What the figures were taken on, with which versions, and when."""
    facts: Row = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": manifest.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": manifest.package_version("triton"),
        "machine": platform.machine(),
        "gpu": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "driver": _driver(),
            "cuda": torch.version.cuda or torch.version.hip,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return facts


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] if found else None


def write(path: Path, results: Row) -> None:
    """JSON at `path` and the rows as CSV beside it, each whole or as it was."""
    write_json(path, results)
    rows = results["rows"]
    with written_aside(path.with_suffix(".csv")) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        table.writeheader()
        table.writerows(rows)


def print_static(results: Row) -> None:
    """Two tables: registers, spills, shared memory and instructions per kernel and architecture; predicted limits per
    operator. Between them what is not proved of shared memory."""
    print(static_table(results["rows"]))
    proved = [row for row in results["rows"] if row.get("accesses") is not None]
    if proved:
        accesses, meeting = (sum(row[name] for row in proved) for name in ("accesses", "meeting"))
        print(f"\nShared memory: {accesses} accesses, {meeting} pairs meet, {len(results['open_pairs'])} open")
        print("\n".join(results["open_pairs"]))
    print("\nPredicted limits, one H200: the least time for the bytes, exponentials and flops that cannot be avoided")
    head = ["operator", "size", "mode", "by", "MB", "M exps", "Mflop", "limit ms"]
    lines = [
        [
            row["operator"], _size(row), row["mode"], row["limited_by"], f"{row['bytes'] / 1e6:.2f}",
            f"{row['exps'] / 1e6:.1f}", f"{row['flops'] / 1e6:.0f}", f"{row['limit_ms']:.4f}",
        ]
        for row in results["limits"]
    ]  # fmt: skip
    print(aligned(head, lines, words=4))


def static_table(rows: Sequence[Row]) -> str:
    """A line per operator, size and kernel; a column per architecture: the most registers / bytes of spills / KiB of
    shared memory / instructions of its specialisations."""
    architectures = list(dict.fromkeys(row["architecture"] for row in rows))
    lines: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        key = (row["operator"], _size(row), str(row.get("kernel", row.get("error"))))
        lines.setdefault(key, {}).setdefault(row["architecture"], []).append(row)
    table = [
        [*key, *(_resources(found.get(architecture, [])) for architecture in architectures)]
        for key, found in lines.items()
    ]
    head = ["operator", "size", "kernel", *architectures]
    return "Registers / bytes of spills / KiB of shared memory / instructions\n" + aligned(head, table, words=3)


def _resources(rows: list[Row]) -> str:
    rows = [row for row in rows if "error" not in row]
    if not rows:
        return "-"
    names = ("registers", "spills", "shared", "instructions")
    registers, spills, shared, instructions = (max(row[name] for row in rows) for name in names)
    return f"{registers} / {spills} / {shared / 1024:.1f} / {instructions}"


def print_measured(results: Row) -> None:
    """A line per operator, size and mode; milliseconds of every provider, launched and replayed."""
    limits, facts = results["limits"], results["machine"]
    print(
        f"{facts['gpu']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}, {facts['date']}"
    )
    print(
        f"limits {limits['source']}: {limits['bytes'] / 1e12:.2f} TB/s, {limits['exps'] / 1e12:.2f} T exp/s, "
        f"{limits['flops'] / 1e12:.1f} Tflop/s; a replay takes {1e3 * limits['replay_ms']:.1f} µs, "
        f"and {1e3 * limits['next_launch_ms']:.2f} µs for every further launch"
    )
    print("milliseconds: launched from the host | replayed from a CUDA graph; MiB: extra memory")
    lines = [_measured_line(key, found) for key, found in _by_mode(results["rows"]).items()]
    print(aligned(MEASURED_HEAD, lines, words=4))
    for row in results["rows"]:
        for kind in ("error", "reason"):
            if row.get(kind) and not str(row[kind]).startswith("not run"):
                where = f"{row['operator']} {_size(row)} {row['provider']} {row['mode'] or ''}"
                print(f"{kind}: {where.strip()}: {row[kind]}")


MEASURED_HEAD = [
    "operator", "size", "mode", "limited by", "ours", "eager", "compiled", "MiB ours", "eager", "compiled",
    "speed-up", "limit ms", "share", "launches",
]  # fmt: skip
Found = dict[tuple[str, bool], Row]


def _by_mode(rows: Iterable[Row]) -> dict[tuple[str, str, str], Found]:
    """Rows by operator, size and mode; each by provider and whether it is a replay."""
    found: dict[tuple[str, str, str], Found] = {}
    for row in rows:
        if "limit_ms" in row:
            key = (row["operator"], _size(row), row["mode"])
            found.setdefault(key, {})[row["provider"], row["graph"]] = row
    return found


def _measured_line(key: tuple[str, str, str], found: Found) -> list[str]:
    def times(provider: str) -> str:
        return " | ".join(number(found.get((provider, graph), {}).get("ms"), ".4g") for graph in (False, True))

    def memory(provider: str) -> str:
        extra = found.get((provider, False), {}).get("extra_bytes")
        return number(None if extra is None else extra / 2**20, ".1f")

    ours = _best(found, "ours")
    others = [row["ms"] for row in (_best(found, name) for name in ("compiled", "eager")) if row][:1]
    launches = found.get(("ours", False), {}).get("launches")
    speed_up = f"{others[0] / ours['ms']:.1f}x" if ours and others else "-"
    any_row = next(iter(found.values()))
    bound: str = any_row["limited_by"]
    floor = ours.get("launch_floor_ms")
    if floor is not None and ours["ms"] <= 1.5 * floor:
        bound += ", launches"
    return [
        *key, bound, *map(times, COLOURS), *map(memory, COLOURS), speed_up, number(any_row["limit_ms"], ".4g"),
        number(ours.get("share"), ".0%"), number(launches, "d"),
    ]  # fmt: skip


def _best(found: Found, provider: str) -> Row:
    """The replay where there is one, else the launched run; empty where neither was timed."""
    timed = [row for graph in (True, False) if (row := found.get((provider, graph), {})).get("ms") is not None]
    return timed[0] if timed else {}


def _size(row: Row) -> str:
    return str(Size(*(row[field.name] for field in fields(Size))))


def save_chart(path: Path, results: Row) -> None:
    """Of measured rows: bars of the base sizes, then one picture of lines per sweep and operator; the faster of
    launched and replayed."""
    pyplot = plotting() if results["kind"] == "measured" else None
    if pyplot is None:
        return
    whole = [row for row in results["rows"] if row.get("ms") and row["mode"] in ("both", "forward")]
    differentiable = {row["operator"] for row in whole if row["mode"] == "both"}
    whole = [row for row in whole if row["mode"] == "both" or row["operator"] not in differentiable]
    sweeps = list(dict.fromkeys((row["sweep"], row["operator"]) for row in whole if row["sweep"]))
    rows = -(-len(sweeps) // 4)
    figure = pyplot.figure(figsize=(16, 5 + 3.2 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, 4, height_ratios=[1.5, *[1] * rows])
    _bars(figure.add_subplot(grid[0, :]), _by_mode(row for row in whole if not row["sweep"]))
    for index, (axis, operator) in enumerate(sweeps):
        chosen = [row for row in whole if (row["sweep"], row["operator"]) == (axis, operator)]
        _lines(figure.add_subplot(grid[1 + index // 4, index % 4]), axis, operator, chosen)
    figure.suptitle(f"{results['machine']['gpu']}: forward and backward, milliseconds (dashes: limit)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axes: Any, cases: dict[tuple[str, str, str], Found]) -> None:
    for shift, provider in enumerate(COLOURS):
        heights = [_best(found, provider).get("ms", 0.0) for found in cases.values()]
        places = [index + 0.27 * (shift - 1) for index in range(len(cases))]
        axes.bar(places, heights, 0.25, label=provider, color=COLOURS[provider])
    for index, found in enumerate(cases.values()):
        least = next(iter(found.values()))["limit_ms"]
        axes.plot([index - 0.4, index + 0.4], [least] * 2, "k--", linewidth=1)
    labels = [f"{operator}\n{size}" for operator, size, _ in cases]
    axes.set_xticks(range(len(cases)), labels, fontsize=6, rotation=90)
    axes.set_yscale("log")
    axes.legend()


def _lines(axes: Any, axis: str, operator: str, rows: list[Row]) -> None:
    name = "batch" if axis == "pairs" else axis
    for provider, colour in COLOURS.items():
        best: dict[int, float] = {}
        for row in rows:
            if row["provider"] == provider:
                best[row[name]] = min(row["ms"], best.get(row[name], row["ms"]))
        if best:
            axes.plot(sorted(best), [best[at] for at in sorted(best)], "o-", color=colour, label=provider)
    limits = {row[name]: row["limit_ms"] for row in rows}
    axes.plot(sorted(limits), [limits[at] for at in sorted(limits)], "k--", linewidth=1)
    axes.set(xscale="log", yscale="log", title=operator, xlabel=axis)
