"""When a call is served here, and when by the definition."""

from __future__ import annotations

from torch import Tensor

# Up to so many values the definition, which calls fewer operators, is as fast or nearly: pixels' logits (B, K, H, W) in
# raw_cross_entropy, pixels (B, H, W) in fuse_cams, scores (B, N, N) in contrastive_separation. Small trainings, the
# demo's among them, so keep the definition's bits.
FEW = {"raw_cross_entropy": 2**21, "fuse_cams": 2**19, "contrastive_separation": 2**20}


def pays(operator: str, backend: str, tensor: Tensor, values: int) -> bool:
    """Whether an operator's call on `values` values should run here: with "auto", for a `tensor` on a CPU, and if they
    are not few."""
    return backend == "auto" and tensor.device.type == "cpu" and values > FEW[operator]
