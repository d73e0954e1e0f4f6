"""Bilinear resampling: as F.interpolate does it, exact taps, and the pixels that a reduction reads."""

import pytest
import torch
import torch.nn.functional as F

from cosa_fast.kernels.reference.resample import ReducedPixels, bilinear_taps, interpolation_matrix


@pytest.mark.parametrize(("source", "target"), [(1, 1), (1, 7), (7, 1), (4, 9), (9, 4), (28, 448), (448, 28), (21, 7)])
def test_interpolation_matrix_is_interpolate(source: int, target: int) -> None:
    values = torch.randn(1, 1, source, dtype=torch.float64)
    expected = F.interpolate(values, size=target, mode="linear", align_corners=False)[0, 0]
    matrix = interpolation_matrix(source, target, values.device)
    torch.testing.assert_close(matrix @ values[0, 0], expected, atol=1e-6, rtol=0)


def test_taps_without_weight_are_not_read() -> None:
    taps = bilinear_taps(21, 7, torch.device("cpu"))  # odd ratio: the middle pixel alone
    assert taps.first.tolist() == taps.second.tolist() == [1, 4, 7, 10, 13, 16, 19]
    pixels = ReducedPixels((21, 21), (7, 7), torch.device("cpu"))
    valid = torch.zeros(1, 21, 21, dtype=torch.bool)
    valid[:, 1::3, 1::3] = True
    assert pixels.all_true(valid).all()
