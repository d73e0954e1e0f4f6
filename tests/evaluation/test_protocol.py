"""The release's way of evaluating beside ours: squashed images, maps summed there, CAMs at a fixed 0.5."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from evaluation_support import CLASSES, MEAN, STD, block_masks, make_dataset, random_network
from sklearn.metrics import average_precision_score
from torch import Tensor

from cosa_fast.config.schema import Config, DataConfig, EvalConfig, TeacherConfig
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.views.pixels import normalise
from cosa_fast.evaluation.evaluator import Evaluator
from cosa_fast.evaluation.metrics import ConfusionMatrix
from cosa_fast.evaluation.result import EvalResult
from cosa_fast.network.model import CoSANet

SCALES = (1.0, 0.5, 1.5)
SIDE = 64


def config(protocol: str, aux_scales: str = "last") -> Config:
    evaluation = replace(EvalConfig(scales=SCALES), protocol=protocol)
    teacher = TeacherConfig(scales=(1.0,), aux_scales=aux_scales)
    return Config(data=DataConfig(mean=MEAN, std=STD, crop_size=SIDE), eval=evaluation, teacher=teacher)


def evaluated(network: CoSANet, dataset: ImageDataset, protocol: str) -> EvalResult:
    result = Evaluator(config(protocol), CLASSES, "cpu").evaluate(network, dataset)
    assert isinstance(result, EvalResult)
    return result


def to(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


@torch.no_grad()
def as_the_release(network: CoSANet, dataset: ImageDataset) -> dict[str, float]:
    """Their figures: (seg label-free, seg label-aware, CAM, CAM†) mIoU over background and classes."""
    names = ("seg_label_free", "seg_label_aware", "cam_at_threshold", "cam_aux_at_threshold")
    counts = {name: ConfusionMatrix(len(CLASSES) + 1) for name in names}
    square = (SIDE, SIDE)
    for index in range(len(dataset)):
        image = dataset.image(index)
        truth = torch.from_numpy(dataset.truth(index, (image.height, image.width)))
        pixels, size = to(normalise(image, MEAN, STD)[None], square), (truth.shape[0], truth.shape[1])
        seg, cam, cam_aux = (torch.zeros(1, channels, *square) for channels in (4, 3, 3))
        for scale in SCALES:
            inputs = to(pixels, (int(scale * SIDE), int(scale * SIDE)))
            outputs = network(torch.cat([inputs, inputs.flip(-1)]))
            wide = to(outputs.seg, square)
            seg += wide[:1] + wide[1:].flip(-1)
            wide = to(outputs.cam, square)
            cam += torch.maximum(wide[:1], wide[1:].flip(-1)).relu()
            wide = to(outputs.cam_aux, square)
            cam_aux = torch.maximum(wide[:1], wide[1:].flip(-1)).relu()  # of the last scale alone
        seg = to(seg, size)
        present = torch.tensor([bool((truth == k).any()) for k in range(1, 4)])
        allowed = torch.cat([torch.ones(1, dtype=torch.bool), present])
        counts["seg_label_free"].update(seg[0].argmax(0), truth)
        counts["seg_label_aware"].update(seg[0].masked_fill(~allowed[:, None, None], -1e5).argmax(0), truth)
        for name, maps in (("cam_at_threshold", cam), ("cam_aux_at_threshold", cam_aux)):
            maps = maps - maps.amin((2, 3), keepdim=True)
            maps = to(maps / (maps.amax((2, 3), keepdim=True) + 1e-5), size)[0] * present[:, None, None]
            label = torch.where(maps.amax(0) <= 0.5, 0, maps.argmax(0) + 1)
            counts[name].update(label, truth)
    return {name: 100 * matrix.miou() for name, matrix in counts.items()}


def test_the_squashed_protocol_is_the_release_s(tmp_path: Path) -> None:
    network, dataset = random_network(3).eval(), make_dataset(tmp_path, block_masks())
    summary = evaluated(network, dataset, "squashed").summary()
    for name, expected in as_the_release(network, dataset).items():
        assert summary[name] == pytest.approx(expected, abs=0.05), name
    assert summary["cam_threshold"] == summary["cam_aux_threshold"] == 0.5
    native = evaluated(network, dataset, "native").summary()
    assert native["seg_label_free"] != summary["seg_label_free"]
    assert "cam_threshold" not in native


@pytest.mark.parametrize("protocol", ["native", "squashed"])
def test_image_ap_is_that_of_the_whole_set(protocol: str, tmp_path: Path) -> None:
    network, dataset = random_network(1).eval(), make_dataset(tmp_path, block_masks())
    result = evaluated(network, dataset, protocol)
    scores, labels = [], []
    for index in range(len(dataset)):
        image = dataset.image(index)
        truth = torch.from_numpy(dataset.truth(index, (image.height, image.width)))
        labels.append([bool((truth == k).any()) for k in range(1, 4)])
        pixels = normalise(image, MEAN, STD)[None]
        sizes = [tuple(max(16, round(side / 16) * 16) for side in pixels.shape[2:])]
        if protocol == "squashed":
            pixels = to(pixels, (SIDE, SIDE))
            sizes = [(int(scale * SIDE), int(scale * SIDE)) for scale in SCALES]
        with torch.no_grad():
            logits = [network(torch.cat([to(pixels, s), to(pixels, s).flip(-1)])).logits.mean(0) for s in sizes]
        scores.append(torch.stack(logits).mean(0))
    expected = [
        100 * average_precision_score([row[c] for row in labels], [float(row[c]) for row in scores]) for c in range(3)
    ]
    assert result.image_ap == pytest.approx(expected)
    assert result.summary()["image_ap"] == pytest.approx(sum(expected) / 3)
    assert {name: row["image_ap"] for name, row in result.per_class().items() if name != "background"} == pytest.approx(
        dict(zip(CLASSES, expected, strict=True))
    )
