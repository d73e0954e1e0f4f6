"""The operators of CoSA. METHOD's equation numbers are those of arXiv 2402.17891.

Every function takes `backend`: "auto" and "reference" run plain PyTorch on any device. Inputs may have any float dtype,
any strides; half types are computed in float32 and give float32 results, float64 is kept, so that derivatives can be
checked. B images, C foreground classes, K = C + 1 channels with background at index 0, ignore index 255.
Bad arguments raise a ValueError that names the argument; values inside tensors are never read back.
"""

from .adamw_ema import adamw_ema_
from .bilateral_filter import bilateral_filter
from .contrastive_separation import contrastive_separation
from .dense_energy import dense_energy
from .fit_mixture import fit_mixture
from .fuse_cams import fuse_cams
from .histogram import histogram
from .perplexity import perplexity
from .raw_cross_entropy import raw_cross_entropy
from .seg_to_cam_loss import seg_to_cam_loss

__all__ = [
    "adamw_ema_",
    "bilateral_filter",
    "contrastive_separation",
    "dense_energy",
    "fit_mixture",
    "fuse_cams",
    "histogram",
    "perplexity",
    "raw_cross_entropy",
    "seg_to_cam_loss",
]
