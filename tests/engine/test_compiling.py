"""Blocks by torch.compile: every block of every family runs compiled; a machine without a compiler goes on without."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine import compiling, fused
from cosa_fast.engine.compiling import blocks_of, compile_blocks, missing_compiler, workable
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.engine.plain import Engine
from cosa_fast.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CLASSES = 3
SHALLOW = "{depth: 3, embed_dim: 48, num_heads: 3"
# What a block's graph is: of blocks that are alike one serves all.
FAMILIES = {
    "ViT": (["model.backbone=vit_tiny_patch16_224", f"model.arguments={SHALLOW}}}"], True),
    "DINOv2": (["model.backbone=vit_small_patch14_reg4_dinov2", f"model.arguments={SHALLOW}}}"], True),
    "DINOv3": (["model.backbone=vit_small_patch16_dinov3", f"model.arguments={SHALLOW}}}"], True),
    "EVA-02": (["model.backbone=eva02_tiny_patch14_224", f"model.arguments={SHALLOW}}}"], True),
    "drop-path": (["model.backbone=vit_tiny_patch16_224", f"model.arguments={SHALLOW}, drop_path_rate: 0.5}}"], False),
    "EfficientNet": (["model.backbone=test_efficientnet", "model.aux_layer=-1"], False),
}


class Counting:
    """A back-end that compiles nothing, and counts graphs and their calls."""

    def __init__(self) -> None:
        self.graphs = 0
        self.calls = 0

    def __call__(self, module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*arguments: Any) -> Any:
            self.calls += 1
            return module.forward(*arguments)

        return run


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    backend = Counting()
    monkeypatch.setattr(fused, "compile_blocks", partial(compile_blocks, backend=backend))
    torch._dynamo.reset()
    settings: Any = torch._dynamo.config
    with settings.patch(recompile_limit=2, accumulated_recompile_limit=8):  # a fraction of torch's, for a small network
        yield backend
    torch._dynamo.reset()


def small(*overrides: str) -> Config:
    fixed = [
        "model.weights=none", "model.aux_layer=-2", "data.crop_size=112", "optim.batch_size=2", "run.compile=on",
        "optim.cotrain_after=0", "teacher.scales=[1.0,0.5]", "model.decoder_width=16", "run.device=cpu",
    ]  # fmt: skip
    return load_config("voc.yaml", [*fixed, *overrides])


def batch_of(config: Config) -> Batch:
    size, count = config.data.crop_size, config.optim.batch_size
    generator = torch.Generator().manual_seed(0)
    weak, strong = (torch.randn(count, 3, size, size, generator=generator) for _ in range(2))
    return Batch(weak, strong, torch.eye(count, CLASSES), torch.ones(count, size, size, dtype=torch.bool), [])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_runs_compiled_and_nothing_is_compiled_twice(family: str, counting: Counting) -> None:
    overrides, alike = FAMILIES[family]
    config = small(*overrides)
    engine, batch = FusedEngine(config, CLASSES, CPU), batch_of(config)
    blocks, sizes = len(blocks_of(engine.on.compute)), 1 + len(config.teacher.scales)
    engine.step(batch)
    graphs = counting.graphs
    # Where blocks differ, those of ON (drop-path) or of both (stages of a CNN) have graphs of their own.
    assert graphs == sizes if alike else sizes < graphs <= blocks * sizes
    counting.calls = 0
    engine.step(batch)
    assert counting.graphs == graphs
    assert counting.calls == blocks * sizes


def test_beyond_a_limit_blocks_would_go_on_uncompiled(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the limit is raised for: the test above can fail."""
    monkeypatch.setattr(compiling, "_allow_graphs", lambda _: None)
    config = small(*FAMILIES["EfficientNet"][0])
    engine, batch = FusedEngine(config, CLASSES, CPU), batch_of(config)
    for _ in range(2):
        counting.calls = 0
        engine.step(batch)
    assert counting.calls < len(blocks_of(engine.on.compute)) * (1 + len(config.teacher.scales))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any compiler."""
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("kind", [FusedEngine, Engine])
def test_without_a_compiler_a_line_says_so_and_the_run_goes_on(
    kind: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(*FAMILIES["ViT"][0], "run.compile=auto")
    with caplog.at_level(logging.WARNING):
        changed = workable(config, CUDA)
    assert (changed.run.compile, changed.run.backend) == ("off", "reference")
    (record,) = caplog.records
    assert record.message.startswith("no C compiler (gcc or clang) was found; install one, or name it in CC; this run")
    assert workable(config, CPU) is config  # nothing is compiled for it
    # The engine computes with what `workable` leaves, and keeps the configuration that it was given.
    without = Config(**{**vars(config), "run": changed.run})
    monkeypatch.setattr("cosa_fast.engine.base.workable", lambda *_: without)
    engine = kind(config, CLASSES, CPU)
    assert engine.config is config
    assert engine.an._backend == engine.objective._backend == "reference"
    engine.step(batch_of(config))


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("override", "device", "what"),
    [("run.compile=on", CUDA, "C"), ("run.backend=triton", CUDA, "C"), ("run.compile=on", CPU, "C\\+\\+")],
)
def test_what_was_asked_for_by_name_is_refused(override: str, device: torch.device, what: str) -> None:
    with pytest.raises(UserError, match=rf"^{override}: no {what} compiler .* install one, or name it in CX?X?C?; or"):
        workable(small(*FAMILIES["ViT"][0], "run.compile=auto", override), device)


def test_a_compiler_is_one_that_can_be_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name if name in ("clang", "mycc") else None)
    monkeypatch.setattr(compiling.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "python3-dev" in str(missing_compiler(CUDA))
    (tmp_path / "Python.h").touch()
    assert missing_compiler(CUDA) is None
    assert "g++" in str(missing_compiler(CPU))
    for value, found in (("mycc -O2", True), ("nothing", False), ("", True)):
        monkeypatch.setenv("CC", value)
        assert (missing_compiler(CUDA) is None) == found, value
