"""What a standalone network learns from: pseudo-labels as they are, with cross entropy."""

import torch.nn.functional as F
from torch import Tensor

from cosa_fast.data_pipeline.batch import ignored

_NO_CLASS = -100


def pseudo_label_terms(logits: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """`loss`: the mean cross entropy over the pixels with a pseudo-label. `foreground_share`: how many of these are
    foreground; `pseudo_label_repeated`: at how many the network says the same. 0-d each, 0 where no pixel has one.

    logits: (B, K, H, W). truth: (B, H, W) uint8 in {0..C, 255}, or int16 (see `ignored`).
    """
    known = ~ignored(truth)
    count = known.sum().clamp(min=1)
    target = truth.long().masked_fill(~known, _NO_CLASS)
    loss = F.cross_entropy(logits.float(), target, ignore_index=_NO_CLASS, reduction="sum") / count
    return {
        "loss": loss,
        "foreground_share": ((target > 0) & known).sum() / count,
        "pseudo_label_repeated": (logits.detach().argmax(1) == target).sum() / count,
    }
