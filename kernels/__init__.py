"""The operators of CoSA. METHOD's equation numbers are those of arXiv 2402.17891.

Every function takes `backend`: "auto" runs Triton kernels on CUDA tensors and plain PyTorch elsewhere, "reference"
always the definitions, "triton" always the kernels (on CPU tensors under TRITON_INTERPRET=1). Inputs may have any float
dtype and any strides; half types are computed in float32 and give float32 results, float64 is kept, so that derivatives
can be checked. B images, C foreground classes, K = C + 1 channels with background at index 0, ignore index 255.
Bad arguments raise a ValueError that names the argument; values inside tensors are not checked.

fuse_cams, perplexity, raw_cross_entropy, seg_to_cam_loss, contrastive_separation, histogram, fit_mixture, adamw_ema,
bilateral_filter, dense_energy: one operator each
contrastive_rows: what contrastive_separation compares, and its gradient's way back to the CAM
reference: the definitions
cpu: what "auto" runs on a CPU where the definitions would need large tensors
launch: how kernels are launched, with which blocks, and how they are compiled without a GPU
triton_functions: what several kernels share on the device
sums: numerators and normalisers into losses, the class balance
validation: what an argument must be
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
