"""The CAM thresholds ξ and ξ† (METHOD section 4, eq. 6): a queue of confidence histograms and the mixture fitted to
their sum."""

from typing import Any

import torch
from torch import Tensor

from cosa_fast.config import ThresholdConfig
from cosa_fast.kernels import fit_mixture, histogram


class DynamicThreshold:
    """ξ from the confidences of the last `queue_length` batches; everything stays on `device`.

    The queue holds one histogram per batch: the sum over its rows is the histogram of all of their confidences.
    """

    def __init__(self, config: ThresholdConfig, device: torch.device, backend: str = "auto") -> None:
        self._config = config
        self._backend = backend
        self._queue = torch.zeros(config.queue_length, config.bins, device=device)
        self._cursor = torch.zeros((), dtype=torch.int64, device=device)
        self._fit: Tensor | None = None
        self.value = torch.tensor(sum(config.clamp) / 2, device=device)

    def update(self, confidence: Tensor, valid: Tensor) -> None:
        """Take in a batch: confidence (B, h, w) in [0, 1], valid (B, h, w) bool; then refit ξ."""
        counts = histogram(confidence, valid, self._config.bins, backend=self._backend)
        self._queue.index_copy_(0, self._cursor.reshape(1), counts.to(self._queue.dtype).reshape(1, -1))
        self._cursor = (self._cursor + 1) % self._config.queue_length
        self.value, self._fit = fit_mixture(
            self._queue.sum(0),
            self._fit,
            floor=self._config.floor,
            clamp=self._config.clamp,
            smoothing=self._config.smoothing,
            backend=self._backend,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on, as tensors of their own."""
        fit = None if self._fit is None else self._fit.clone()
        return {
            "queue": self._queue.clone(),
            "cursor": self._cursor.clone(),
            "fit": fit,
            "value": self.value.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; the queue's shape must be that of the configuration."""
        device = self._queue.device
        if state["queue"].shape != self._queue.shape:
            raise ValueError(f"queue: got {tuple(state['queue'].shape)}, want {tuple(self._queue.shape)}")
        self._queue = state["queue"].to(device, copy=True)
        self._cursor = state["cursor"].to(device, copy=True)
        self._fit = None if state["fit"] is None else state["fit"].to(device, copy=True)
        self.value = state["value"].to(device, copy=True)


class FixedThreshold:
    """A ξ that does not move (the ablation of the dynamic one)."""

    def __init__(self, value: float, device: torch.device) -> None:
        self.value = torch.tensor(value, device=device)

    def update(self, confidence: Tensor, valid: Tensor) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the value is the configuration's."""


Threshold = DynamicThreshold | FixedThreshold


def build_thresholds(
    config: ThresholdConfig, device: torch.device, backend: str = "auto"
) -> tuple[Threshold, Threshold]:
    """(ξ, ξ†); `backend` is that of the kernels.

    In mode `band` the middle of each band stands in, for the log and the gallery; no loss reads it.
    """
    if config.mode == "dynamic":
        return DynamicThreshold(config, device, backend), DynamicThreshold(config, device, backend)
    if config.mode == "fixed":
        return FixedThreshold(config.value, device), FixedThreshold(config.value_aux, device)
    return FixedThreshold(sum(config.band) / 2, device), FixedThreshold(sum(config.band_aux) / 2, device)
