"""Blocks by torch.compile: when, how many graphs that may take, and what happens on a machine without a compiler."""

import logging
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn

from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError
from cosa_fast.network.model import CoSANet

logger = logging.getLogger(__name__)

# Graphs beyond those that a step needs: other batches and engines of the same process.
SPARE_GRAPHS = 64


def compiles(config: Config, device: torch.device) -> bool:
    """Whether blocks are compiled; "auto": on a GPU."""
    return config.run.compile == "on" or (config.run.compile == "auto" and device.type == "cuda")


def compile_blocks(network: CoSANet, shapes: int, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the encoder block by block: where they are alike, one compilation serves all of them. What is compiled is
    kept for later runs, in TORCHINDUCTOR_CACHE_DIR or the user's cache folder.

    `shapes`: how many sizes of input the blocks will see, each a graph of its own.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "cosa_fast" / "inductor"))
    blocks = blocks_of(network)
    _allow_graphs(len(blocks) * shapes)
    for block in blocks:
        block.compile(dynamic=False, backend=backend)


def blocks_of(network: CoSANet) -> list[nn.Module]:
    """What is compiled: a ViT's blocks, an EfficientNet's stages; other CNNs have none."""
    return list(getattr(network.encoder.backbone, "blocks", []))


def _allow_graphs(count: int) -> None:
    """Let a block's code have so many more graphs. Blocks share their code, but not always their graphs: an
    EfficientNet's stages differ, and so do a ViT's blocks with drop-path. Beyond its limit (8) torch would go on with
    uncompiled blocks and say nothing."""
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, count + SPARE_GRAPHS)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 4 * (count + SPARE_GRAPHS))


def workable(config: Config, device: torch.device) -> Config:
    """The configuration as this machine can run it: unchanged where there is a compiler, or none is needed; else
    without what needs one, which is said in a line. UserError where that was asked for by name."""
    asked = [
        f"run.{key}={value}" for key, value in (("compile", "on"), ("backend", "triton")) if _is(config, key, value)
    ]
    needed = compiles(config, device) or (device.type == "cuda" and config.run.backend != "reference")
    lacking = missing_compiler(device) if needed else None
    if lacking is None:
        return config
    if asked:
        raise UserError(f"{asked[0]}: {lacking}; or leave the setting at auto")
    logger.warning("%s; this run goes on with PyTorch's own kernels, several times slower", lacking)
    backend = "reference" if device.type == "cuda" else config.run.backend
    return replace(config, run=replace(config.run, compile="off", backend=backend))


def _is(config: Config, key: str, value: str) -> bool:
    return getattr(config.run, key) == value


def missing_compiler(device: torch.device) -> str | None:
    """What this machine lacks to compile for a device, with the remedy; None where it lacks nothing.

    Triton builds the launchers of its kernels with a C compiler and Python's headers; for a CPU torch.compile writes
    C++."""
    if device.type == "cuda":
        if not _there("CC", "gcc", "clang"):
            return "no C compiler (gcc or clang) was found; install one, or name it in CC"
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
            return "Python's headers (Python.h) were not found; install python3-dev, or what your system calls it"
        return None
    if not _there("CXX", "g++", "clang++"):
        return "no C++ compiler (g++ or clang++) was found; install one, or name it in CXX"
    return None


def _there(variable: str, *names: str) -> bool:
    named = os.environ.get(variable)
    return any(shutil.which(name) for name in ([named.split()[0]] if named and named.split() else names))
