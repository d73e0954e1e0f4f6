"""Training with the Triton kernels is training with their definitions."""

from collections.abc import Callable

import pytest
import torch

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.plain import Engine
from cosa_fast.errors import UserError
from cosa_fast.kernels.launch.table import TABLE, row

CLASSES = 5  # of the tiny data set
ITERATIONS = 4  # the first update already mixes all kernels; a slip shows in the second
# Counts of pixels, which jump where a pixel sits on a threshold; the losses are continuous.
COUNTS = ("omega", "foreground_share", "foreground_share_aux", "foreground_reliability")


@pytest.mark.slow
def test_iterations_give_the_same_losses_and_weights(
    kernel_device: torch.device,
    make_config: Callable[..., Config],
    batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernel_device.type == "cpu":  # the interpreter pays per program, so few large ones; other tests run the small
        monkeypatch.setitem(TABLE, "fuse_cams", [row(ROWS=64, COLUMNS=64)])
    overrides = ["optim.cotrain_after=0", "optim.iterations=100", "teacher.scales=[1.0,0.5]", "threshold.bins=32"]
    engines = [
        Engine(make_config(*overrides, f"run.backend={backend}"), CLASSES, kernel_device)
        for backend in ("reference", "triton")
    ]
    for iteration in range(ITERATIONS):
        batch = batches[iteration % len(batches)].to(kernel_device)
        expected, found = (engine.step(batch) for engine in engines)
        assert expected.keys() == found.keys()
        for name in expected.keys() - set(COUNTS):
            torch.testing.assert_close(
                found[name],
                expected[name],
                rtol=1e-4,
                atol=1e-5,
                msg=lambda text, at=(iteration, name): f"{at}: {text}",
            )
    expected, found = (torch.cat([p.detach().flatten() for p in engine.on.master.parameters()]) for engine in engines)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_a_backend_that_cannot_run_is_refused_before_training(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cosa_fast.kernels.launch.runtime.INTERPRETED", False)
    with pytest.raises(UserError, match=r"^run\.backend = triton on cpu: .* TRITON_INTERPRET=1; use run\.backend=auto"):
        Engine(make_config("run.backend=triton"), CLASSES, torch.device("cpu"))
