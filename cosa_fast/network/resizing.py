"""Images at the sizes that a network takes."""

import torch.nn.functional as F
from torch import Tensor


def resize_to_stride(images: Tensor, scale: float, stride: int) -> Tensor:
    """Images (B, 3, H, W) at about `scale`, each side the nearest multiple of `stride`; bilinear,
    align_corners=False."""
    height, width = (max(stride, round(side * scale / stride) * stride) for side in images.shape[2:])
    if (height, width) == tuple(images.shape[2:]):
        return images
    return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)
