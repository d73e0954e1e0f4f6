"""The operators of CoSA in plain PyTorch: their definition, the oracle of the kernels, and the CPU path.

Arguments are taken as checked (cosa_fast.kernels checks them). Half types are computed in float32; float64 stays
float64, so that derivatives can be checked.

cams: fuse_cams, and the class maps M' before its maximum
cross_entropy: perplexity, pseudo_labels, raw_cross_entropy
seg_to_cam: seg_to_cam_loss
contrastive: contrastive_separation
thresholds: histogram, fit_mixture
optimiser: adamw_ema_
dense: bilateral_filter, dense_energy
mixture: the EM fit and the split of eq. 6, on arrays
resample: bilinear resampling, of whole maps or of the few pixels that a reduction reads
common: what several of these share
"""

from .cams import MIN_MAX_EPSILON, category_type, class_maps, fuse_cams
from .contrastive import ZERO_NORM, contrastive_separation
from .cross_entropy import DISTANCE_FLOOR, THRESHOLD_MARGIN, perplexity, pseudo_labels, raw_cross_entropy
from .dense import bilateral_filter, dense_energy
from .optimiser import adamw_ema_
from .seg_to_cam import seg_to_cam_loss
from .thresholds import fit_mixture, histogram

__all__ = [
    "DISTANCE_FLOOR",
    "MIN_MAX_EPSILON",
    "THRESHOLD_MARGIN",
    "ZERO_NORM",
    "adamw_ema_",
    "bilateral_filter",
    "category_type",
    "class_maps",
    "contrastive_separation",
    "dense_energy",
    "fit_mixture",
    "fuse_cams",
    "histogram",
    "perplexity",
    "pseudo_labels",
    "raw_cross_entropy",
    "seg_to_cam_loss",
]
