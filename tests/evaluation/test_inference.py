"""Multi-scale inference: sums over bands of rows, and modules that get their modes back."""

import contextlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from evaluation_support import ColourNet, block_masks, evaluate, make_dataset, random_network
from torch import Tensor, nn

from cosa_fast.evaluation import inference
from cosa_fast.network.model import Outputs


@pytest.mark.parametrize("band_values", [1, 500, 1 << 24])
def test_summed_logits_equal_whole_interpolated_maps(monkeypatch: pytest.MonkeyPatch, band_values: int) -> None:
    monkeypatch.setattr(inference, "BAND_VALUES", band_values)
    generator = torch.Generator().manual_seed(3)
    segs = [torch.randn(2, 4, h, w, generator=generator) for h, w in ((3, 5), (1, 1), (9, 2))]
    size = (23, 14)
    expected = torch.zeros(4, *size)
    for seg in segs:
        whole = F.interpolate(seg, size=size, mode="bilinear", align_corners=False)
        expected += whole[0] + whole[1].flip(-1)
    bands = list(inference.summed_logits(segs, size))
    assert [rows.start for rows, _ in bands] == sorted(rows.start for rows, _ in bands)
    torch.testing.assert_close(torch.cat([logits for _, logits in bands], dim=1), expected, rtol=1e-5, atol=1e-5)


def test_modes_come_back_even_after_an_error(tmp_path: Path) -> None:
    class Failing(ColourNet):
        def forward(self, images: Tensor, seg: bool = True) -> Outputs:
            raise RuntimeError("no forward")

    dataset = make_dataset(tmp_path, block_masks())
    for model in (ColourNet(), Failing()):
        model.add_module("norm", nn.BatchNorm2d(3))
        model.train()
        model.get_submodule("norm").eval()  # frozen statistics stay frozen
        with contextlib.suppress(RuntimeError):
            evaluate(model, dataset)
        assert model.training
        assert not model.get_submodule("norm").training


def test_a_few_images_go_through_a_packed_network_at_all_scales_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network().eval()
    images = torch.randn(2, 3, 40, 57, generator=torch.Generator().manual_seed(1))
    rows = inference.scaled_rows(images, (1.0, 0.5, 1.5, 1.0), flip=True, stride=network.stride)
    with torch.no_grad():
        apart = inference.forward_rows(network, rows, (1.0, 0.5))
        monkeypatch.setattr(network, "forward", None)
        with inference.in_one_pass(network, torch.device("meta")):
            together = inference.forward_rows(network, rows, (1.0, 0.5))
    assert network.encoder.attention == "sdpa"
    assert not network.encoder._segments, "an evaluation sees hundreds of sizes"
    assert list(together) == [1.0, 0.5, 1.5]
    assert together[1.5].seg is None
    for scale, expected in apart.items():
        for own, other in zip(together[scale], expected, strict=True):
            assert (own is None) == (other is None)
            if own is not None:
                torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
