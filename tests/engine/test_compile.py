"""Compiled blocks compute what the plain engine does, and are kept for the next run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.engine.plain import Engine

CLASSES = 5  # of the tiny data set
CPU = torch.device("cpu")


@pytest.mark.slow
def test_compiled_and_plain_engine_agree_and_read_each_others_state(
    make_config: Callable[..., Config], batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One scale, packed: two shapes to compile, that of ON and that of AN.
    options = ("optim.cotrain_after=0", "teacher.scales=[1.0]", "teacher.attention=packed", "optim.lr=1e-4")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Set and removed again, so that what the engine sets is undone, too.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", False)  # scalar code compiles faster
    compiled = FusedEngine(make_config(*options, "run.compile=on"), CLASSES, CPU)
    plain = Engine(make_config(*options), CLASSES, CPU)
    for batch in batches[:2]:
        found, expected = compiled.step(batch), plain.step(batch)
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-4, atol=1e-5)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cosa_fast" / "inductor")
    assert any((tmp_path / "cosa_fast" / "inductor").rglob("*.so"))

    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    with compiled.evaluating(), torch.no_grad():
        compiled.on.master(torch.zeros(1, 3, 48, 72))  # an image of another size
    assert counters["stats"]["unique_graphs"] == graphs

    first, second = compiled.state_dict(), plain.state_dict()
    plain.load_state_dict(first)
    compiled.load_state_dict(second)
    found, expected = compiled.step(batches[2]), plain.step(batches[2])
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-4, atol=1e-5)
