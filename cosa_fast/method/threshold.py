"""The CAM thresholds ξ and ξ† (METHOD section 4, eq. 6): a queue of confidence histograms and the mixture fitted to
their sum."""

from typing import Any

import torch
from torch import Tensor

from cosa_fast.config.schema import ThresholdConfig
from cosa_fast.distributed import ALONE, Ranks
from cosa_fast.kernels import fit_mixture, histogram


class DynamicThreshold:
    """ξ from the confidences of the last `queue_length` batches; everything stays on `device`.

    The queue holds one histogram per batch: the sum over its rows is the histogram of all of their confidences.
    """

    def __init__(
        self, config: ThresholdConfig, device: torch.device, backend: str = "auto", ranks: Ranks = ALONE
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._backend = backend
        self._queue = torch.zeros(config.queue_length, config.bins, device=device)
        self._cursor = torch.zeros((), dtype=torch.int64, device=device)
        # What fit_mixture hands on from call to call; a weight of 0 says that there was no fit yet.
        self._fit = torch.tensor([sum(config.clamp) / 2, 0, 0, 0, 0, 0], device=device)
        self.value = self._fit[0].clone()

    def update(self, confidence: Tensor, valid: Tensor) -> None:
        """Take in a batch: confidence (B, h, w) in [0, 1], valid (B, h, w) bool, of every rank; then refit ξ."""
        counts = self._ranks.sum_(histogram(confidence, valid, self._config.bins, backend=self._backend))
        self._queue.index_copy_(0, self._cursor.reshape(1), counts.to(self._queue.dtype).reshape(1, -1))
        self._cursor.add_(1).remainder_(self._config.queue_length)
        value, fit = fit_mixture(
            self._queue.sum(0),
            self._fit,
            floor=self._config.floor,
            clamp=self._config.clamp,
            smoothing=self._config.smoothing,
            backend=self._backend,
        )
        # In place: a captured step reads and writes the same memory every time.
        self.value.copy_(value)
        self._fit.copy_(fit)

    def tensors(self) -> list[Tensor]:
        """All that an update changes."""
        return [self._queue, self._cursor, self._fit, self.value]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on, as tensors of their own."""
        return {
            "queue": self._queue.clone(),
            "cursor": self._cursor.clone(),
            "fit": self._fit.clone(),
            "value": self.value.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; the queue's shape must be that of the configuration."""
        if state["queue"].shape != self._queue.shape:
            raise ValueError(f"queue: got {tuple(state['queue'].shape)}, want {tuple(self._queue.shape)}")
        for own, name in zip(self.tensors(), ("queue", "cursor", "fit", "value"), strict=True):
            own.copy_(state[name])


class FixedThreshold:
    """A ξ that does not move (the ablation of the dynamic one)."""

    def __init__(self, value: float, device: torch.device) -> None:
        self.value = torch.tensor(value, device=device)

    def update(self, confidence: Tensor, valid: Tensor) -> None:
        """Nothing to learn."""

    def tensors(self) -> list[Tensor]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the value is the configuration's."""


Threshold = DynamicThreshold | FixedThreshold


def build_thresholds(
    config: ThresholdConfig, device: torch.device, backend: str = "auto", ranks: Ranks = ALONE
) -> tuple[Threshold, Threshold]:
    """(ξ, ξ†); `backend` is that of the kernels.

    In mode `band` the middle of each band stands in, for the log and the gallery; no loss reads it.
    """
    if config.mode == "dynamic":
        return DynamicThreshold(config, device, backend, ranks), DynamicThreshold(config, device, backend, ranks)
    if config.mode == "fixed":
        return FixedThreshold(config.value, device), FixedThreshold(config.value_aux, device)
    return FixedThreshold(sum(config.band) / 2, device), FixedThreshold(sum(config.band_aux) / 2, device)
