"""The step means the same on every device."""

from collections.abc import Callable

import pytest
import torch

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.plain import Engine

CLASSES = 5  # of the tiny data set
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["", "energy"])
def test_losses_of_three_steps_are_those_of_the_cpu(
    device: str, recipe: str, make_config: Callable[..., Config], batches: list[Batch]
) -> None:
    overrides = ["loss.energy=1.0"] if recipe == "energy" else []
    config = make_config("optim.cotrain_after=1", *overrides)
    engines = [Engine(config, CLASSES, torch.device(name)) for name in ("cpu", device)]
    for batch in batches[:3]:
        expected, found = (engine.step(batch.to(engine.device)) for engine in engines)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            # Ω and the shares jump where a pixel sits on a threshold; losses are continuous.
            if name not in ("omega", "foreground_share", "foreground_share_aux", "foreground_reliability"):
                torch.testing.assert_close(found[name].cpu(), value, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("wanted", [False, True])
def test_float32_convolutions_use_tf32_only_where_the_run_says_so(
    wanted: bool, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not wanted)
    Engine(make_config(f"run.tf32={str(wanted).lower()}"), CLASSES, torch.device("cpu"))
    assert torch.backends.cudnn.allow_tf32 == wanted
    assert torch.get_float32_matmul_precision() == "highest"
