"""One JSON, one tar and one table of what gpu_check.sh measured, predicted beside measured."""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.steps.providers import BACKBONES
from bench.tables import aligned, number
from cosa_fast.files import read_json, write_json
from cosa_fast.run import manifest

RESULTS = Path(__file__).parents[1] / "results"
MEMORY, STEPS = RESULTS / "memory_predicted.json", RESULTS / "step_predicted.json"
# A dictionary with one of these, a number, is a figure.
FIGURES = ("ms", "difference", "seg_label_free", "ms_per_image", "microseconds", "passed")
LOG_LINES = 12  # of a failed part, on the terminal
Row = dict[str, Any]


def count_figures(value: Any) -> int:
    """How many figures a part's results hold."""
    if isinstance(value, list):
        return sum(map(count_figures, value))
    if not isinstance(value, dict):
        return 0
    own = any(isinstance(value.get(key), int | float) for key in FIGURES)
    return own + sum(map(count_figures, value.values()))


class Report:
    """What the parts have left so far, in OUT: summary.json, and gpu_check.tar.gz of everything."""

    def __init__(self, folder: Path, out: Path, gpu: Row | None) -> None:
        self._folder, self._out = folder, out
        self._parts: list[Row] = []
        self._head = {"gpu": gpu, "dry": gpu is None, "commit": manifest.commit()}
        self._seen: dict[str, int] = {}

    @property
    def status(self) -> int:
        """1 if a part that ran failed or left no figure, else 0."""
        ran = [part for part in self._parts if "left_out" not in part]
        return int(not ran or any(part["status"] != 0 or part["figures"] == 0 for part in ran))

    def left_out(self, name: str, reason: str) -> None:
        """A part that was not run."""
        self._parts.append({"part": name, "left_out": reason})
        print(f"{name}: left out: {reason}", flush=True)

    def ended(self, name: str, status: int, seconds: float, limit: float) -> None:
        """A part that was run; its log's end is shown where it failed."""
        figures = count_figures(self._read(name))
        self._parts.append(
            {"part": name, "status": status, "seconds": round(seconds, 1), "limit": limit, "figures": figures}
        )
        outcome = {0: "done", 124: "stopped at its limit"}.get(status, f"failed with status {status}")
        print(f"{name}: {outcome}, {figures} figures, {seconds:.0f} s", flush=True)
        if status or not figures:
            with suppress(OSError):
                lines = (self._folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
                print("\n".join(f"    {line[:200]}" for line in lines[-LOG_LINES:]), flush=True)
        self._write()

    def refresh(self) -> None:
        """Write the summary anew if a part has left a figure since."""
        seen = {path.name: path.stat().st_mtime_ns for path in self._folder.glob("*.json")}
        if seen != self._seen:
            self._seen = seen
            self._write()

    def close(self) -> None:
        """The summary, the tar and the table."""
        summary = self._write()
        with suppress(OSError), tarfile.open(self._out / "gpu_check.tar.gz", "w:gz") as tar:
            tar.add(self._folder, "gpu_check", filter=_without_weights)
        print(f"\n{table(summary)}\nwritten {self._out / 'summary.json'} and gpu_check.tar.gz", flush=True)

    def _read(self, name: str) -> Any:
        path = self._folder / f"{name}.json"
        with suppress(Exception):  # a part that was killed may leave anything
            return read_json(path)
        return None

    def _write(self) -> Row:
        results = {path.stem: self._read(path.stem) for path in sorted(self._folder.glob("*.json"))}
        results.pop("answer", None)
        summary = {**self._head, "parts": self._parts, "results": results, "against_prediction": against(results)}
        try:
            write_json(self._out / "summary.json", summary)
        except Exception as error:  # a full disk must not end what is being measured
            print(f"summary not written: {error}", file=sys.stderr, flush=True)
        return summary


def _without_weights(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """No checkpoints, pictures or events of the training: what comes back from a machine has a limit."""
    keep = entry.isdir() or Path(entry.name).suffix in (".json", ".jsonl", ".csv", ".log", ".yaml", ".txt", ".xml")
    return entry if keep and entry.size < 4 * 2**20 and "demo" not in Path(entry.name).parts else None


def against(results: Row) -> list[Row]:
    """Measured figures beside the predicted ones, for what was predicted."""
    rows = []
    for what, size, measured, predicted, unit in _pairs(results):
        ratio = measured / predicted if predicted else None
        rows.append(
            {"what": what, "size": size, "measured": measured, "predicted": predicted, "unit": unit, "ratio": ratio}
        )
    return rows


def _pairs(results: Row) -> Iterator[tuple[str, str, float, float, str]]:
    steps = _results(results, "steps") + _results(results, "large")
    predicted = json.loads(STEPS.read_text(encoding="utf-8")) if STEPS.is_file() else {"rows": []}
    gpu = _gpu_of(results)
    memory = read_json(MEMORY)
    for result in steps:
        ours = result["providers"].get("ours", {})
        if "ms" not in ours or result["crop"] != 448:
            continue
        size, name = result["batch_size"], _short(result["backbone"])
        title = f"{name} B={size}"
        for row in predicted["rows"]:
            if (row["gpu"], row["backbone"], row["batch_size"]) == (gpu, name, size):
                yield "step", title, ours["ms"], row["ms"], "ms"
                yield "speed", title, ours["images_per_second"], row["images_per_second"], "img/s"
                for phase, milliseconds in (result.get("phases_ms") or {}).items():
                    if row["phases_ms"].get(phase):
                        yield f"phase {phase} (not captured)", title, milliseconds, row["phases_ms"][phase], "ms"
        for row in memory["rows"]:
            same = (row["backbone"], row["batch_size"], row["checkpoint_blocks"]) == (name, size, False)
            if same and ours.get("peak_mib") is not None:
                yield "peak memory", title, ours["peak_mib"], row["peak_mib"], "MiB"


def _results(results: Row, part: str) -> list[Row]:
    found = results.get(part) or {}
    return [result for result in found.get("results", []) if "backbone" in result]


def _gpu_of(results: Row) -> str | None:
    """ "H100" or "H200", as a part's machine names its device."""
    for part in results.values():
        device = str(((part or {}).get("machine") or {}).get("device"))
        for name in ("H100", "H200"):
            if name in device:
                return name
    return None


def _short(backbone: str) -> str:
    known = {name: short for short, name in BACKBONES.items()}
    return known.get(backbone.split(".")[0], backbone)


def table(summary: Row) -> str:
    """What a reader wants first: how the parts ended, speeds, ratios, what is wrong, predicted beside measured."""
    lines = []
    for part in summary["parts"]:
        state = part.get("left_out") or f"status {part['status']}, {part['figures']} figures, {part['seconds']} s"
        lines.append([part["part"], state])
    found = [aligned(["part", "end"], lines, words=2)]
    results = summary["results"]
    for row in ((results.get("correctness") or {}).get("rows")) or []:
        if row["good"] is False:
            why = row.get("error") or f"{row['difference']:.2e}"
            found.append(f"WRONG: {row['operator']} {row.get('variant') or ''} {row.get('result')}: {why}")
    speeds = [
        [part, _title(result), name, number(row.get("ms"), ".2f"), number(row.get("images_per_second"), ".1f"),
         number(row.get("share_of_matrix_rate"), ".0%"), number(row.get("peak_mib"), ".0f")]
        for part, whole in results.items() if isinstance(whole, dict)
        for result in whole.get("results", []) if isinstance(result, dict) and "providers" in result
        for name, row in result["providers"].items()
    ]  # fmt: skip
    if speeds:
        found.append(aligned(["part", "size", "provider", "ms", "img/s", "of rate", "peak MiB"], speeds, words=3))
        found.append("\n".join(_notes(results)))
    if summary["against_prediction"]:
        head = ["", "size", "measured", "predicted", "unit", "measured / predicted"]
        rows = [
            [row["what"], row["size"], f"{row['measured']:.2f}", f"{row['predicted']:.2f}", row["unit"],
             number(row["ratio"], ".2f")]
            for row in summary["against_prediction"]
        ]  # fmt: skip
        found.append(aligned(head, rows, words=2))
    return "\n\n".join(filter(None, found))


def _notes(results: Row) -> Iterator[str]:
    """Why providers have no figure, or steps were not captured."""
    for part, whole in results.items():
        for result in whole.get("results", []) if isinstance(whole, dict) else []:
            for name, row in result.get("providers", {}).items() if isinstance(result, dict) else []:
                if "error" in row:
                    yield f"{part}, {_title(result)}, {name}: {row['error']}"
                elif "not_captured" in row:
                    yield f"{part}, {_title(result)}, {name}: not captured: {row['not_captured']}"


def _title(result: Row) -> str:
    return f"{_short(result.get('backbone', 'losses'))} B={result['batch_size']} C={result['classes']}"
