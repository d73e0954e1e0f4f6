"""Operators as a CPU runs them: the definitions of `reference`, in an order that keeps what they work on in its cache.

A CPU reads memory far more slowly than it computes. So nothing of (B, K, H, W) is made: maps are upsampled a band of
rows at a time, pixels that do not count are left out, gradients are those of the formula, not of its operators. Plain
PyTorch, in the type of the arithmetic (float64 stays float64), the same arguments and results as in `reference`.

raw_cross_entropy: eq. 5, a band at a time, which the backward computes once more
contrastive_separation: eqs. 9, 10, label by label
fuse_cams: METHOD section 3, image by image
choice: which calls are served here
bands: upsampling a band of rows; the box of the pixels that count
"""

from .choice import pays
from .contrastive_separation import contrastive_separation
from .fuse_cams import fuse_cams
from .raw_cross_entropy import raw_cross_entropy

__all__ = ["contrastive_separation", "fuse_cams", "pays", "raw_cross_entropy"]
