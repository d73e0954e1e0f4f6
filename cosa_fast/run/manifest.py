"""What a run was made with: versions, machine, commit, seed and data, written to manifest.json."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import cosa_fast
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.identity import contents, digest
from cosa_fast.errors import UserError
from cosa_fast.files import read_json, write_json

PACKAGES = (
    *("torch", "torchvision", "timm", "segmentation-models-pytorch", "triton", "numpy", "pillow", "scikit-learn"),
    "nvidia-dali-cuda130",
)
# So many images are read: on a network disk each takes its time.
SAMPLE = 200


def describe(config: Config, device: torch.device, **extra: Any) -> dict[str, Any]:
    """The manifest as a dictionary; `extra` is added to it (data fingerprint, counts)."""
    return {
        "cosa_fast": cosa_fast.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "seed": config.run.seed,
        **extra,
    }


def fingerprints(training: ImageDataset, validation: ImageDataset) -> dict[str, str]:
    """sha256 in hex of each part of the data, by what a user calls it. The images are told by their
    names, and by what is in up to 200 of them, evenly spread over the set."""
    return {
        "the training images' names": digest(training.ids),
        "the training labels": digest((*training.ids, training.fingerprint())),
        "the training images": digest(contents(training, SAMPLE)),
        "the validation images' names": digest(validation.ids),
        "the validation images": digest(contents(validation, SAMPLE)),
    }


def write(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of this start; those of earlier ones, which the file holds, go under "before". A damaged file
    is replaced."""
    try:
        before = read_json(path) if path.is_file() else None
    except UserError:
        before = None
    if isinstance(before, dict):
        earlier = before.pop("before", [])
        manifest = {**manifest, "before": [*(earlier if isinstance(earlier, list) else []), before]}
    write_json(path, manifest)


def package_version(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the source tree, with "+changes" where it differs; None where the package was installed without
    its repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=root, capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.returncode else "")
