"""Evaluation against the plain computation: whole maps, one loop per pixel set, the kernels' own fuse_cams."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_support import CLASSES, MEAN, STD, ColourNet, block_masks, evaluate, make_dataset, random_network
from torch import Tensor

from cosa_fast.config.schema import Config, DataConfig, EvalConfig, TeacherConfig
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.labels import LabelTable
from cosa_fast.data_pipeline.views.pixels import normalise
from cosa_fast.errors import UserError
from cosa_fast.evaluation import cam, gathering, inference, part
from cosa_fast.evaluation.evaluator import Evaluator
from cosa_fast.evaluation.result import EvalResult
from cosa_fast.kernels import fuse_cams
from cosa_fast.network.model import CoSANet, Outputs


def naive_iou(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Per-class IoU in percent over all pairs (prediction, truth), NaN where the class is in neither."""
    prediction = np.concatenate([p[t != 255] for p, t in pairs])
    truth = np.concatenate([t[t != 255] for _, t in pairs])
    values = []
    for k in range(len(CLASSES) + 1):
        union = ((prediction == k) | (truth == k)).sum()
        values.append(100 * ((prediction == k) & (truth == k)).sum() / union if union else math.nan)
    return np.array(values)


def outputs_of(model: CoSANet, image: Tensor, scale: float) -> Outputs:
    size = [max(model.stride, round(side * scale / model.stride) * model.stride) for side in image.shape[1:]]
    scaled = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)
    with torch.no_grad():
        return model(torch.cat([scaled, scaled.flip(-1)]))


def one_class_maps(cams: list[Tensor], labels: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, H, W): fuse_cams told of one class at a time gives that class's normalised map."""
    single = torch.diag(labels[0])[:, None]
    return torch.stack([fuse_cams(cams, one, size)[0][0] for one in single])


def naive_evaluation(
    model: CoSANet, dataset: ImageDataset, scales: tuple[float, ...], teacher: tuple[float, ...]
) -> dict:
    """Every prediction of every kind, from full-size maps of all classes."""
    found: dict = {name: [] for name in ("free", "aware", "cam", "cam_label_free", "cam_aux", "ensemble")}
    for index in range(len(dataset)):
        truth = dataset.mask(index)
        image = normalise(dataset.image(index), MEAN, STD)
        labels = torch.tensor([[float((truth == c + 1).any()) for c in range(len(CLASSES))]])
        logits = torch.zeros(1, len(CLASSES) + 1, *truth.shape)
        for scale in scales:
            both = F.interpolate(outputs_of(model, image, scale).seg, size=truth.shape, mode="bilinear")
            logits += both[:1] + both[1:].flip(-1)
        gated = logits.masked_fill(torch.cat([torch.ones(1, 1), labels], 1)[:, :, None, None] == 0, -torch.inf)
        found["free"].append((logits.argmax(1)[0].numpy(), truth))
        found["aware"].append((gated.argmax(1)[0].numpy(), truth))
        outputs = [outputs_of(model, image, scale) for scale in teacher]
        maps = one_class_maps([output.cam for output in outputs], labels, truth.shape)
        maps_aux = one_class_maps([output.cam_aux for output in outputs], labels, truth.shape)
        predicted = (torch.stack([output.logits.mean(0) for output in outputs]).mean(0) > 0).float()[None]
        guessed = one_class_maps([output.cam for output in outputs], predicted, truth.shape)
        by_name = {"cam": maps, "cam_label_free": guessed, "cam_aux": maps_aux, "ensemble": (maps + maps_aux) / 2}
        for name, each in by_name.items():
            confidence, category = each.max(0)
            found[name].append((confidence.numpy(), category.numpy() + 1, truth))
    return found


def thresholded(cams: list, threshold: float) -> np.ndarray:
    return naive_iou([(np.where(c >= np.float32(threshold), k, 0), t) for c, k, t in cams])


def test_every_figure_equals_the_plain_computation(tmp_path: Path, tiny_network: CoSANet) -> None:
    dataset = make_dataset(tmp_path, block_masks())
    scales, teacher = (1.0, 0.5, 1.25), (1.0, 1.5)
    result = evaluate(
        tiny_network,
        dataset,
        eval=EvalConfig(scales=scales, cam_step=0.1),
        teacher=TeacherConfig(scales=teacher),
        thresholds=(0.35, 0.55),
    )
    found = naive_evaluation(tiny_network, dataset, scales, teacher)
    np.testing.assert_allclose(result.label_free.iou, naive_iou(found["free"]), atol=1e-6)
    np.testing.assert_allclose(result.label_aware.iou, naive_iou(found["aware"]), atol=1e-6)
    own = {
        "cam": (result.cam, 0.35),
        "cam_label_free": (result.cam_label_free, 0.35),
        "cam_aux": (result.cam_aux, 0.55),
        "ensemble": (result.ensemble, 0.45),
    }
    for name, (score, threshold) in own.items():
        assert score is not None
        assert score.at_threshold is not None
        assert score.threshold == pytest.approx(threshold)
        assert result.summary()[f"{name}_best_threshold"] == score.best_threshold
        np.testing.assert_allclose(score.at_threshold.iou, thresholded(found[name], threshold), atol=1e-6)
        foreground = np.concatenate([(c >= np.float32(threshold))[t != 255] for c, _, t in found[name]])
        assert score.foreground_share == pytest.approx(foreground.mean())
        by_threshold = {t / 10: np.nanmean(thresholded(found[name], t / 10)) for t in range(1, 10)}
        assert score.best.miou == pytest.approx(max(by_threshold.values()), abs=1e-6)
        assert by_threshold[round(score.best_threshold, 1)] == pytest.approx(score.best.miou, abs=1e-6)
    truth = np.concatenate([t[t != 255] for _, t in found["free"]])
    assert result.foreground_share_true == pytest.approx((truth > 0).mean())
    assert result.label_free.miou == pytest.approx(np.nanmean(naive_iou(found["free"])), abs=1e-6)
    distinct = {round(value, 3) for value in result.summary().values()}
    assert len(distinct) > 8, "figures that coincide would hide that one is reported for another"


@pytest.mark.parametrize("flip", [True, False])
def test_images_of_one_size_can_be_forwarded_together(tmp_path: Path, tiny_network: CoSANet, flip: bool) -> None:
    """Counts do not depend on who shares a forward pass, nor on the order."""
    masks = [*block_masks(), *(mask[::-1].copy() for mask in block_masks()), *(3 - block_masks()[0],)]
    dataset = make_dataset(tmp_path, masks)
    options: dict = {"scales": (1.0, 0.5), "cam_step": 0.1, "flip": flip}
    teacher = TeacherConfig(scales=(1.0, 1.5), flip=flip)
    alone, together = (
        evaluate(tiny_network, dataset, eval=EvalConfig(batch_size=size, **options), teacher=teacher) for size in (1, 2)
    )
    assert together.images == len(masks)
    assert str(together) == str(alone)
    model, seen = ColourNet(), []
    evaluate(
        model, dataset, eval=EvalConfig(batch_size=2, scales=(1.0,)), progress=lambda done, total: seen.append(done)
    )
    assert sorted(shape[0] for shape, _ in model.calls) == [2, 4, 4, 4]
    assert seen == list(range(1, len(masks) + 1))


@pytest.mark.parametrize("protocol", ["native", "squashed"])
@pytest.mark.parametrize("has_masks", [True, False])
def test_what_a_gpu_counts_together_is_what_a_cpu_counts_image_by_image(
    tmp_path: Path, tiny_network: CoSANet, monkeypatch: pytest.MonkeyPatch, protocol: str, has_masks: bool
) -> None:
    """The GPU's way, here on the CPU: whole batches, all classes where the classifier chooses, copies of counters."""
    masks = [mask[::step].copy() for step in (1, -1, 1) for mask in block_masks()]
    masks[3] = 3 - masks[3]
    dataset = make_dataset(tmp_path, masks)
    if not has_masks:
        present = np.array([[(mask == c + 1).any() for c in range(len(CLASSES))] for mask in masks], np.uint8)
        table = LabelTable(present, np.ones(len(masks), bool))
        dataset = ImageDataset(CLASSES, dataset.ids, [dataset.image_path(k) for k in range(len(masks))], table)
    options: dict = {"scales": (1.0, 0.5), "cam_step": 0.1, "protocol": protocol}
    common: dict = {"teacher": TeacherConfig(scales=(1.0, 1.5)), "crop_size": 64}
    alone = evaluate(tiny_network, dataset, eval=EvalConfig(batch_size=1, **options), **common)
    for module in (cam, gathering, part, inference):
        monkeypatch.setattr(module, "must_wait", lambda device: True)
    monkeypatch.setattr(cam, "MAP_VALUES", 10_000)
    monkeypatch.setattr(inference, "BAND_VALUES", 10_000)
    together = evaluate(tiny_network, dataset, eval=EvalConfig(batch_size=3, **options), **common)
    assert str(together) == str(alone)
    assert alone.observed is not None
    assert together.observed is not None
    assert str(together.observed) == str(alone.observed)


def test_networks_that_share_a_pass_score_what_each_scores_alone(tmp_path: Path, tiny_network: CoSANet) -> None:
    dataset, networks = make_dataset(tmp_path, block_masks()), {"on": tiny_network, "an": random_network(5)}
    seen: list[tuple[int, int]] = []
    config = Config(data=DataConfig(mean=MEAN, std=STD), eval=EvalConfig(scales=(1.0, 0.5)))
    evaluator = Evaluator(config, CLASSES, "cpu")
    both = evaluator.evaluate_all(networks, dataset, progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert str(both["on"]) != str(both["an"])
    for name, network in networks.items():
        assert str(both[name]) == str(evaluator.evaluate(network, dataset))


def test_two_ranks_count_what_one_does(tmp_path: Path, tiny_network: CoSANet) -> None:
    """Their sums are taken here one rank after the other."""
    dataset, kept = make_dataset(tmp_path, block_masks()), []

    class Second:
        rank, size = 1, 2

        def sum_(self, tensor: Tensor) -> None:
            kept.append(tensor.clone())

    class First(Second):
        rank = 0

        def sum_(self, tensor: Tensor) -> None:
            tensor += kept.pop(0)

    config = Config(data=DataConfig(mean=MEAN, std=STD), eval=EvalConfig(scales=(1.0,)))
    results = [
        Evaluator(config, CLASSES, "cpu", **options).evaluate(tiny_network, dataset)
        for options in ({"ranks": Second()}, {"ranks": First()}, {})
    ]
    assert kept == []
    assert str(results[1]) == str(results[2])
    assert str(results[1].observed) == str(results[2].observed)
    assert str(results[0]) != str(results[2])


def test_half_precision_changes_the_figures_a_little(tmp_path: Path, tiny_network: CoSANet) -> None:
    dataset = make_dataset(tmp_path, block_masks())
    single, half = (evaluate(tiny_network, dataset, precision=name).summary() for name in ("fp32", "bf16"))
    types: set[torch.dtype] = set()
    hook = tiny_network.decoder.register_forward_hook(lambda *call: types.add(call[2].dtype))
    evaluate(tiny_network, dataset, precision="bf16")
    hook.remove()
    assert types == {torch.bfloat16}
    assert single.keys() == half.keys()
    for name in ("seg_label_free", "seg_label_aware", "cam_best"):
        assert half[name] == pytest.approx(single[name], abs=5)


def test_right_network_scores_full_marks_and_wrong_one_does_not(tmp_path: Path) -> None:
    masks = [np.zeros((32, 48), np.uint8), np.zeros((32, 48), np.uint8)]
    masks[0][:16, :24], masks[1][16:, 24:] = 1, 2
    dataset = make_dataset(tmp_path, masks)
    right, wrong = evaluate(ColourNet(), dataset), evaluate(ColourNet(confuse=(1, 2)), dataset)
    assert right.label_free.miou > 90
    assert wrong.label_free.iou[1] == 0.0
    assert wrong.label_aware.iou[1] == 0.0, (
        "told the true label, it cannot name the other class; it calls it background"
    )


def test_label_aware_knows_the_labels_and_label_free_does_not(tmp_path: Path) -> None:
    mask = np.zeros((32, 48), np.uint8)
    mask[:, :24] = 1
    dataset = make_dataset(tmp_path, [mask])

    class Undecided(ColourNet):
        """Prefers the dog by a hair over the cat wherever there is a cat."""

        def forward(self, images: Tensor, seg: bool = True) -> Outputs:
            outputs = super().forward(images, seg)
            assert outputs.seg is not None
            scores = outputs.seg.clone()
            scores[:, 2] = scores[:, 1] + 0.1
            return outputs._replace(seg=scores)

    result = evaluate(Undecided(), dataset)
    assert result.label_free.iou[1] == 0.0
    assert result.label_aware.iou[1] > 95
    assert math.isnan(result.label_aware.iou[2]), "the dog is neither there nor predicted"


def test_scales_of_both_kinds_share_their_forward_passes(tmp_path: Path) -> None:
    model = ColourNet()
    dataset = make_dataset(tmp_path, [np.ones((64, 32), np.uint8)])
    evaluate(model, dataset, eval=EvalConfig(scales=(1.0, 0.5)), teacher=TeacherConfig(scales=(1.0, 1.5, 0.5)))
    assert model.calls == [((2, 3, 64, 32), True), ((2, 3, 32, 16), True), ((2, 3, 96, 48), False)]


@pytest.mark.parametrize(("eval_flip", "teacher_flip", "rows"), [(True, False, 2), (False, True, 2), (False, False, 1)])
def test_flips_of_evaluation_and_teacher_are_independent(
    tmp_path: Path, tiny_network: CoSANet, eval_flip: bool, teacher_flip: bool, rows: int
) -> None:
    dataset = make_dataset(tmp_path, block_masks())

    def with_flips(seg: bool, cam: bool) -> EvalResult:
        return evaluate(
            tiny_network,
            dataset,
            eval=EvalConfig(scales=(1.0,), flip=seg),
            teacher=TeacherConfig(scales=(1.0,), flip=cam),
        )

    mixed = with_flips(eval_flip, teacher_flip)
    assert mixed.label_free == with_flips(eval_flip, not teacher_flip).label_free
    assert str(mixed.cam) == str(with_flips(not eval_flip, teacher_flip).cam)
    assert str(mixed.cam) != str(with_flips(eval_flip, not teacher_flip).cam)
    model = ColourNet()
    evaluate(
        model,
        make_dataset(tmp_path / "one", [np.ones((16, 16), np.uint8)]),
        eval=EvalConfig(scales=(1.0,), flip=eval_flip),
        teacher=TeacherConfig(scales=(1.0,), flip=teacher_flip),
    )
    assert model.calls[0][0][0] == rows


def test_network_without_auxiliary_head_has_no_auxiliary_scores(tmp_path: Path) -> None:
    result = evaluate(ColourNet(aux=False), make_dataset(tmp_path, block_masks()))
    assert result.cam_aux is None
    assert result.ensemble is None
    assert not [name for name in result.summary() if "aux" in name or "ensemble" in name]


def test_without_a_threshold_only_the_best_one_is_reported(tmp_path: Path) -> None:
    summary = evaluate(ColourNet(), make_dataset(tmp_path, block_masks()), thresholds=(0.4, None)).summary()
    assert "cam_at_threshold" in summary
    assert "cam_aux_at_threshold" not in summary
    assert "ensemble_at_threshold" not in summary
    assert summary["cam_threshold"] == pytest.approx(0.4)


def test_chosen_classes_restrict_the_mean_and_the_table(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, block_masks())
    result = evaluate(
        ColourNet(), dataset, eval=EvalConfig(scales=(1.0,), classes=("horse",), coexistence=("cat", "dog"))
    )
    iou = evaluate(ColourNet(), dataset).label_free.iou
    assert result.label_free.miou == pytest.approx((iou[0] + iou[3]) / 2)
    assert result.label_free.c_miou == pytest.approx((iou[1] + iou[2]) / 2)
    assert result.summary()["c_miou_seg_label_free"] == pytest.approx((iou[1] + iou[2]) / 2)
    assert list(result.per_class()) == ["background", "horse"]
    assert "C-mIoU" in result.table()


@pytest.mark.parametrize("key", ["classes", "coexistence"])
def test_unknown_class_names_are_one_line_with_the_nearest_name(tmp_path: Path, key: str) -> None:
    config = replace(EvalConfig(), **{key: ("hrose",)})
    with pytest.raises(UserError, match=rf"eval\.{key}: there is no class 'hrose' \(did you mean 'horse'\?\)"):
        evaluate(ColourNet(), make_dataset(tmp_path, block_masks()), eval=config)


def test_other_classes_than_the_networks_are_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, block_masks(), classes=("dog", "cat", "horse"))
    with pytest.raises(UserError, match="dog, cat, horse"):
        evaluate(ColourNet(), dataset)


def test_limit_takes_images_evenly_from_the_set(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [np.full((8 * (i + 1), 8), i % 4, np.uint8) for i in range(6)])
    model = ColourNet()
    seen: list[tuple[int, int]] = []
    result = evaluate(model, dataset, limit=3, progress=lambda done, total: seen.append((done, total)))
    assert result.images == 3
    assert [shape[2] for shape, _ in model.calls] == [8, 24, 40]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert evaluate(ColourNet(), dataset, limit=100).images == 6
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(ColourNet(), dataset, limit=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (5, 3)])
def test_images_smaller_than_a_patch_are_evaluated(
    tmp_path: Path, tiny_network: CoSANet, size: tuple[int, int]
) -> None:
    result = evaluate(tiny_network, make_dataset(tmp_path, [np.ones(size, np.uint8)]))
    assert 0 <= result.label_free.miou <= 100


def test_image_of_ignored_pixels_alone_changes_nothing(tmp_path: Path) -> None:
    result = evaluate(ColourNet(), make_dataset(tmp_path, [np.full((16, 16), 255, np.uint8)]))
    assert math.isnan(result.label_free.miou)
    assert "-" in result.table()
