"""Device functions that several kernels share: the list of present classes."""

import pytest
import torch

from cosa_fast.kernels.triton_functions import present_classes


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_labels_of_any_type_are_present_above_zero(kernel_device: torch.device, dtype: torch.dtype) -> None:
    labels = torch.tensor([[1, 0, 2, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 3]], device=kernel_device).to(dtype)
    for view in (labels, labels.T.contiguous().T):
        classes, counts = present_classes(view)
        assert counts.tolist() == [3, 0, 1]
        assert classes.tolist() == [[0, 2, 4, 3, 1], [4, 3, 2, 1, 0], [4, 3, 2, 1, 0]]


def test_present_classes_beyond_a_block_and_negative_labels(kernel_device: torch.device) -> None:
    labels = torch.arange(-601.0, 602.0, device=kernel_device)[None]
    classes, counts = present_classes(labels)
    assert counts.tolist() == [601]
    assert classes[0].tolist() == [*range(602, 1203), *range(601, -1, -1)]
