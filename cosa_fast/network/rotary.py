"""Rotary positions that are computed once for each size of images.

timm builds those of DINOv3 on the CPU at every forward pass and copies them over: a step that does so waits for the
host, and cannot be captured in a CUDA graph. (Those of other ViTs are built on the device.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cosa_fast.network import torchvision_compat  # noqa: F401  (must come before timm)

from timm.layers import RotaryEmbeddingDinoV3  # isort: skip

# Sizes that are kept: the first ones, which are training's; an evaluation sees hundreds, in `passing_sizes`. None of
# training's ever goes, as a captured step may read it.
MOST_SIZES = 8


class KeptRotaryEmbedding(RotaryEmbeddingDinoV3):
    """timm's, which keeps what it has computed. `keep_rotary_positions` turns one into this by its class alone."""

    kept: dict[Any, Tensor]

    def get_embed(self, shape: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """As timm's: (h·w, 2·d) for a grid of h × w tokens."""
        changing = self.training and self.aug_active  # drawn anew at every call
        key = None if shape is None else (tuple(shape), args, tuple(kwargs.items()), self.periods.device)
        if key is None or changing:
            return super().get_embed(shape, *args, **kwargs)
        if key in self.kept:
            return self.kept[key]
        positions = super().get_embed(shape, *args, **kwargs)
        # What inference mode makes may not be used where gradients are recorded.
        if len(self.kept) < MOST_SIZES and not torch.is_inference_mode_enabled():
            self.kept[key] = positions
        return positions

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": {}}  # a copy makes its own, for its device

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        self.kept = {}  # another device or type
        return super()._apply(fn, *args, **kwargs)


@contextmanager
def passing_sizes(model: nn.Module) -> Iterator[None]:
    """Inside, what is kept for a size of images goes on leaving, so that training's sizes still find room."""
    kept = [(module, dict(module.kept)) for module in model.modules() if isinstance(module, KeptRotaryEmbedding)]
    try:
        yield
    finally:
        for module, sizes in kept:
            module.kept = sizes


def keep_rotary_positions(backbone: nn.Module) -> None:
    """Let the backbone compute its rotary positions once for each of the first few sizes of images."""
    for module in backbone.modules():
        if type(module) is RotaryEmbeddingDinoV3:
            module.__class__ = KeptRotaryEmbedding
            module.__dict__["kept"] = {}
