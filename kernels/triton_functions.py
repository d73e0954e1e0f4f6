"""What several kernels share on the device: bilinear taps, a logarithm, and the list of present classes.

present_classes: labels (B, C) → classes (B, C) int32 and counts (B,) int32, so that other kernels visit only the
present classes (1–3 of 80 on COCO). Row b of `classes` starts with the counts[b] present classes in ascending order;
the absent ones follow, descending, so that every element is a class index and may be read ahead. One program per image
reads its C labels once and writes C + 1 integers: a launch-bound kernel. An inclusive count of the present classes
gives each class its place: from the front if present, from the back if not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch.runtime import configure, launch, strides, tl, triton_jit


@triton_jit
def bilinear_tap(index, source, target):
    """The two elements of `source` that element `index` of `target` mixes (align_corners=False), as resample.py has it.

    (first int32, second int32, weight fp32 in [0, 1)) of (1 − weight)·x[first] + weight·x[second]. Taps are exact and
    inside the source for every index ≥ 0, also past the target's end; source·target must stay below 2^28.
    """
    numerator = (2 * index + 1) * source - target
    numerator = tl.minimum(tl.maximum(numerator, 0), 2 * target * (source - 1))
    # An integer division in five instructions instead of twenty: the float quotient is wrong by 1 at most.
    inverse = 1.0 / (2 * target)
    first = (numerator.to(tl.float32) * inverse).to(tl.int32)
    remainder = numerator - first * (2 * target)
    correction = (remainder >= 2 * target).to(tl.int32) - (remainder < 0).to(tl.int32)
    first += correction
    remainder -= correction * (2 * target)
    second = tl.minimum(first + 1, source - 1)
    return first, second, remainder.to(tl.float32) * inverse


@triton_jit
def log1p(x):
    """log(1 + x) for x in [0, 1] = 2 artanh(x / (2 + x)): relative error near 1e-7, also where 1 + x rounds to 1."""
    z = x / (2.0 + x)
    z2 = z * z
    series = 1.0 / 9 + z2 * (1.0 / 11 + z2 * (1.0 / 13))
    series = 1.0 + z2 * (1.0 / 3 + z2 * (1.0 / 5 + z2 * (1.0 / 7 + z2 * series)))
    return 2.0 * z * series


@triton_jit
def _present_classes_kernel(
    labels_ptr,  # (B, C) any number type, any strides; present where > 0
    classes_ptr,  # (B, C) int32, contiguous: present classes ascending, then absent ones descending
    counts_ptr,  # (B,) int32: number of present classes
    num_classes,
    labels_stride0, labels_stride1,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, num_classes, BLOCK):
        category = start + tl.arange(0, BLOCK)
        inside = category < num_classes
        at = image * labels_stride0 + category.to(tl.int64) * labels_stride1
        label = tl.load(labels_ptr + at, mask=inside, other=0).to(tl.float32)
        present = ((label > 0) & inside).to(tl.int32)
        before = count + tl.cumsum(present, 0) - present
        place = tl.where(present == 1, before, num_classes - 1 - (category - before))
        tl.store(classes_ptr + image * num_classes + place, category, mask=inside)
        count += tl.sum(present, 0)
    tl.store(counts_ptr + image, count)


def present_classes(image_labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C) labels → (classes (B, C) int32, counts (B,) int32) on the device, without a host synchronisation.

    classes[b, :counts[b]] are the classes of image b with a label > 0, ascending; the rest are its absent classes.
    """
    batch, num_classes = image_labels.shape
    classes = torch.empty((batch, num_classes), dtype=torch.int32, device=image_labels.device)
    counts = torch.empty(batch, dtype=torch.int32, device=image_labels.device)
    launch(
        _present_classes_kernel,
        (batch,),
        configure("present_classes", num_classes, image_labels.device),
        labels_ptr=image_labels,
        classes_ptr=classes,
        counts_ptr=counts,
        num_classes=num_classes,
        **strides("labels_stride", image_labels),
    )
    return classes, counts
