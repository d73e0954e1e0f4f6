"""bench/gpu_check.sh --dry, from a clone that is not installed, on a machine with little more than torch, triton, numpy
and timm: every part leaves figures."""

import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import machine

ROOT = Path(__file__).resolve().parents[3]
# What the machine that lends a GPU need not have.
BARE = ("sklearn", "scipy", "matplotlib", "pycocotools", "nvidia", "pydensecrf", "xformers", "skimage", "torchmetrics",
        "cv2", "pandas", "hypothesis", "pytest", "_pytest")  # fmt: skip
# Python imports it at its start: modules that cannot be found, and no installed cosa_fast.
HIDE = """
import sys
hidden = set({hidden!r})

class Blind:
    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else self._finder.find_spec(name, path, target)

finders = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
sys.meta_path = [Blind(finder) for finder in finders]
"""


@dataclass
class Check:
    """A run of the script: what it printed, its status, and OUT."""

    process: "subprocess.CompletedProcess[str]"
    out: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.out / "summary.json").read_text(encoding="utf-8"))


def check(folder: Path, *arguments: str, hidden: tuple[str, ...] = BARE) -> Check:
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(HIDE.format(hidden=hidden))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(folder / "site"), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "bench" / "gpu_check.sh"), str(folder / "out"), *arguments]
    process = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    return Check(process, folder / "out")


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Check:
    return check(tmp_path_factory.mktemp("dry"), "--dry")


def test_every_part_leaves_figures(dry: Check) -> None:
    assert dry.process.returncode == 0, dry.process.stdout + dry.process.stderr
    names = ["correctness", "steps", "losses", "kernels", "baseline", "ablations", "training"]
    assert [part["part"] for part in dry.summary["parts"]] == names
    for part in dry.summary["parts"]:
        if part["part"] == "baseline":
            assert part["left_out"] == "not installed: sklearn"
        else:
            assert part["status"] == 0, part
            assert part["figures"] > 0, part


def test_what_comes_back_is_one_summary_and_one_tar(dry: Check) -> None:
    assert sorted(path.name for path in dry.out.iterdir()) == ["gpu_check.tar.gz", "summary.json"]
    with tarfile.open(dry.out / "gpu_check.tar.gz") as tar:
        names = {Path(name).name for name in tar.getnames()}
    assert {
        f"{part['part']}.{kind}" for part in dry.summary["parts"] if "status" in part for kind in ("json", "log")
    } <= names
    assert not any(name.endswith(".pt") for name in names)


def test_the_first_line_says_what_is_missing(dry: Check) -> None:
    first = dry.process.stdout.splitlines()[0]
    assert first.startswith("not installed: sklearn (left out: baseline, and the usual method in losses), ")
    assert "tensorboard" not in first
    # The usual method says so too, and the others have figures.
    providers = dry.summary["results"]["losses"]["results"][0]["providers"]
    assert "sklearn" in providers["baseline"]["error"]
    assert providers["ours"]["ms"] > 0


def test_kernels_are_checked_against_their_definitions(dry: Check) -> None:
    rows = dry.summary["results"]["correctness"]["rows"]
    assert {row["operator"] for row in rows} > {"fuse_cams", "adamw_ema_", "dense_energy", "step"}
    assert all(row["good"] for row in rows)


@pytest.mark.parametrize("name", machine.NEEDED)
def test_what_it_cannot_do_without_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    found = check(tmp_path, "--dry", hidden=(name,))
    assert found.process.returncode == 2
    assert found.process.stdout == ""
    (line,) = found.process.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable} has no {name}; ")
    assert not found.out.exists()


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = check(tmp_path)
    assert found.process.returncode == 2
    assert found.process.stderr == "error: torch sees no CUDA device; bench/gpu_check.sh needs one (or --dry)\n"
    assert not found.out.exists()
