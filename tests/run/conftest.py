"""Tests of tiny networks: one thread is fastest, and counting FLOPs once, which takes as long as six steps."""

from collections.abc import Iterator

import pytest
import torch

from cosa_fast.config.schema import Config
from cosa_fast.engine.flops import step_flops
from cosa_fast.network.model import CoSANet
from cosa_fast.run import training


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _flops_counted_once() -> Iterator[None]:
    """Runs of one network, batch and crop share the count."""
    known: dict[str, int] = {}

    def remembered(network: CoSANet, config: Config, *, cotraining: bool) -> int:
        settings = (config.model, config.teacher, config.data.crop_size, config.optim.batch_size, cotraining)
        key = f"{network} {settings}"
        if key not in known:
            known[key] = step_flops(network, config, cotraining=cotraining)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "step_flops", remembered)
        yield
