"""Tests of tiny networks: one thread is fastest."""

import pytest
import torch
from evaluation_support import random_network

from cosa_fast.network.model import CoSANet


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_network() -> CoSANet:
    """A network whose figures are all different; to be read only."""
    return random_network()
