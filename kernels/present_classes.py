"""The present classes of every image as a compact list, so that other kernels visit only those (1–3 of 80 on COCO).

labels (B, C) → classes (B, C) int32 and counts (B,) int32: row b of `classes` starts with the counts[b] present classes
in ascending order; the absent ones follow, descending, so that every element is a class index and may be read ahead.
One program per image reads its C labels once and writes C + 1 integers: a launch-bound kernel. An inclusive count of
the present classes gives each class its place: from the front if present, from the back if not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch_table import Configuration
from .runtime import launch, run_best, strides, tl, triton_jit


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

    def run(configuration: Configuration) -> None:
        launch(
            _present_classes_kernel,
            (batch,),
            configuration,
            labels_ptr=image_labels,
            classes_ptr=classes,
            counts_ptr=counts,
            num_classes=num_classes,
            **strides("labels_stride", image_labels),
        )

    run_best("present_classes", num_classes, image_labels.device, run)
    return classes, counts
