"""Evaluation against the plain computation: whole maps, one loop per pixel set, the kernels' own fuse_cams."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cosa_fast import evaluate
from cosa_fast.config.parsing import config_to_dict
from cosa_fast.config.schema import Config, EvalConfig, ModelConfig, TeacherConfig
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.views.pixels import normalise
from cosa_fast.errors import UserError
from cosa_fast.evaluation import inference
from cosa_fast.evaluation.cam import normalised_cams, present_classes, strongest
from cosa_fast.evaluation.evaluator import evaluate_network
from cosa_fast.evaluation.result import EvalResult
from cosa_fast.kernels import fuse_cams
from cosa_fast.network.build import build_model
from cosa_fast.network.model import CoSANet, Outputs
from cosa_fast.run import checkpoint

CLASSES = ("cat", "dog", "horse")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
COLOURS = np.array([(10, 10, 10), (250, 10, 10), (10, 250, 10), (10, 10, 250)], dtype=np.uint8)
SIZES = ((40, 57), (33, 24), (64, 48))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_dataset(root: Path, masks: list[np.ndarray], classes: tuple[str, ...] = CLASSES) -> ImageDataset:
    """Image files whose colour is the class of the mask, so that a network can be right or wrong at will."""
    root.mkdir(parents=True, exist_ok=True)
    files, mask_files = [], []
    for index, mask in enumerate(masks):
        files.append(root / f"{index}.png")
        mask_files.append(root / f"{index}_mask.png")
        Image.fromarray(COLOURS[np.where(mask == 255, 0, mask)]).save(files[-1])
        Image.fromarray(mask).save(mask_files[-1])
    return ImageDataset(classes, [str(index) for index in range(len(masks))], files, masks=mask_files)


def block_masks() -> list[np.ndarray]:
    """A cat; a dog and a horse with an ignored border; nothing but background."""
    first, second, third = (np.zeros(size, np.uint8) for size in SIZES)
    first[8:30, 10:40] = 1
    second[:16] = 2
    second[20:, 12:] = 3
    second[:2] = 255
    return [first, second, third]


class ColourNet(nn.Module):
    """A network of stride 8 that reads the class from the colour of a cell: real Outputs, known answers."""

    stride = 8

    def __init__(self, aux: bool = True, confuse: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.aux = aux
        self.calls: list[tuple[tuple[int, ...], bool]] = []
        targets = torch.tensor(COLOURS / 255.0, dtype=torch.float32)
        if confuse is not None:
            targets[list(confuse)] = targets[list(reversed(confuse))]
        self.register_buffer("targets", (targets - 0.5) / 0.25)

    def forward(self, images: Tensor, seg: bool = True) -> Outputs:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append((tuple(images.shape), seg))
        cells = F.avg_pool2d(images, self.stride)
        scores = -(cells[:, None] - self.targets[None, :, :, None, None]).square().sum(2)
        cam = scores[:, 1:] - scores[:, :1]
        return Outputs(cam.amax((2, 3)), cam, scores if seg else None, None, 0.5 * cam if self.aux else None)


def run(model: nn.Module, dataset: ImageDataset, **options: object) -> EvalResult:
    arguments: dict = {
        "classes": CLASSES,
        "eval": EvalConfig(scales=(1.0,), cam_step=0.1),
        "teacher": TeacherConfig(scales=(1.0,)),
        "mean": MEAN,
        "std": STD,
        "device": "cpu",
        "thresholds": (0.3, 0.5),
    }
    return evaluate_network(model, dataset, **(arguments | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny_network() -> CoSANet:
    torch.manual_seed(0)
    config = ModelConfig(backbone="test_vit", weights="none", aux_layer=-2, decoder_width=16)
    network = build_model(config, len(CLASSES))
    with torch.no_grad():  # random heads that disagree between pixels and classes
        for parameter in network.head_parameters():
            parameter.normal_(std=0.3)
    return network


# --- maps of one image ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("present", [[], [1], [0, 2, 4]])
@pytest.mark.parametrize("size", [(37, 50), (16, 8)])
def test_class_maps_have_the_confidence_and_category_of_fuse_cams(present: list[int], size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    cams = [torch.randn(2, 5, h, w, generator=generator) for h, w in ((5, 7), (3, 4), (8, 10))]
    labels = torch.zeros(1, 5)
    labels[0, present] = 1
    expected_confidence, expected_category = fuse_cams(cams, labels, size)
    indices = torch.tensor(present, dtype=torch.int64)
    confidence, category = strongest(normalised_cams(cams, indices, size), indices)
    torch.testing.assert_close(confidence, expected_confidence[0], rtol=0, atol=1e-6)
    assert torch.equal(category, expected_category[0].long())


def test_class_maps_without_flip_equal_those_with_a_mirrored_copy() -> None:
    cam = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    present = torch.tensor([0, 2])
    alone = normalised_cams([cam], present, (20, 31))
    torch.testing.assert_close(alone, normalised_cams([torch.cat([cam, cam.flip(-1)])], present, (20, 31)))


def test_present_classes_are_those_of_the_mask() -> None:
    mask = torch.tensor([[0, 3, 255], [1, 3, 0]], dtype=torch.uint8)
    assert present_classes(mask).tolist() == [0, 2]


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


# --- the whole evaluation ------------------------------------------------------------------------------------------


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
    result = run(
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
        by_threshold = {t / 10: np.nanmean(thresholded(found[name], t / 10)) for t in range(1, 10)}
        assert score.best.miou == pytest.approx(max(by_threshold.values()), abs=1e-6)
        assert by_threshold[round(score.best_threshold, 1)] == pytest.approx(score.best.miou, abs=1e-6)
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
        run(tiny_network, dataset, eval=EvalConfig(batch_size=size, **options), teacher=teacher) for size in (1, 2)
    )
    assert together.images == len(masks)
    assert str(together) == str(alone)
    model, seen = ColourNet(), []
    run(model, dataset, eval=EvalConfig(batch_size=2, scales=(1.0,)), progress=lambda done, total: seen.append(done))
    assert sorted(shape[0] for shape, _ in model.calls) == [2, 4, 4, 4]
    assert seen == list(range(1, len(masks) + 1))


def test_half_precision_changes_the_figures_a_little(tmp_path: Path, tiny_network: CoSANet) -> None:
    dataset = make_dataset(tmp_path, block_masks())
    single, half = (run(tiny_network, dataset, dtype=dtype).summary() for dtype in (torch.float32, torch.bfloat16))
    types: set[torch.dtype] = set()
    hook = tiny_network.decoder.register_forward_hook(lambda *call: types.add(call[2].dtype))
    run(tiny_network, dataset, dtype=torch.bfloat16)
    hook.remove()
    assert types == {torch.bfloat16}
    assert single.keys() == half.keys()
    for name in ("seg_label_free", "seg_label_aware", "cam_best"):
        assert half[name] == pytest.approx(single[name], abs=5)


def test_right_network_scores_full_marks_and_wrong_one_does_not(tmp_path: Path) -> None:
    masks = [np.zeros((32, 48), np.uint8), np.zeros((32, 48), np.uint8)]
    masks[0][:16, :24], masks[1][16:, 24:] = 1, 2
    dataset = make_dataset(tmp_path, masks)
    right, wrong = run(ColourNet(), dataset), run(ColourNet(confuse=(1, 2)), dataset)
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

    result = run(Undecided(), dataset)
    assert result.label_free.iou[1] == 0.0
    assert result.label_aware.iou[1] > 95
    assert math.isnan(result.label_aware.iou[2]), "the dog is neither there nor predicted"


def test_scales_of_both_kinds_share_their_forward_passes(tmp_path: Path) -> None:
    model = ColourNet()
    dataset = make_dataset(tmp_path, [np.ones((64, 32), np.uint8)])
    run(model, dataset, eval=EvalConfig(scales=(1.0, 0.5)), teacher=TeacherConfig(scales=(1.0, 1.5, 0.5)))
    assert model.calls == [((2, 3, 64, 32), True), ((2, 3, 32, 16), True), ((2, 3, 96, 48), False)]


@pytest.mark.parametrize(("eval_flip", "teacher_flip", "rows"), [(True, False, 2), (False, True, 2), (False, False, 1)])
def test_flips_of_evaluation_and_teacher_are_independent(
    tmp_path: Path, tiny_network: CoSANet, eval_flip: bool, teacher_flip: bool, rows: int
) -> None:
    dataset = make_dataset(tmp_path, block_masks())

    def with_flips(seg: bool, cam: bool) -> EvalResult:
        return run(
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
    run(
        model,
        make_dataset(tmp_path / "one", [np.ones((16, 16), np.uint8)]),
        eval=EvalConfig(scales=(1.0,), flip=eval_flip),
        teacher=TeacherConfig(scales=(1.0,), flip=teacher_flip),
    )
    assert model.calls[0][0][0] == rows


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
            run(model, dataset)
        assert model.training
        assert not model.get_submodule("norm").training


def test_network_without_auxiliary_head_has_no_auxiliary_scores(tmp_path: Path) -> None:
    result = run(ColourNet(aux=False), make_dataset(tmp_path, block_masks()))
    assert result.cam_aux is None
    assert result.ensemble is None
    assert not [name for name in result.summary() if "aux" in name or "ensemble" in name]


def test_without_a_threshold_only_the_best_one_is_reported(tmp_path: Path) -> None:
    summary = run(ColourNet(), make_dataset(tmp_path, block_masks()), thresholds=(0.4, None)).summary()
    assert "cam_at_threshold" in summary
    assert "cam_aux_at_threshold" not in summary
    assert "ensemble_at_threshold" not in summary
    assert summary["cam_threshold"] == pytest.approx(0.4)


def test_chosen_classes_restrict_the_mean_and_the_table(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, block_masks())
    result = run(ColourNet(), dataset, eval=EvalConfig(scales=(1.0,), classes=("horse",), coexistence=("cat", "dog")))
    iou = run(ColourNet(), dataset).label_free.iou
    assert result.label_free.miou == pytest.approx((iou[0] + iou[3]) / 2)
    assert result.label_free.c_miou == pytest.approx((iou[1] + iou[2]) / 2)
    assert result.summary()["c_miou_seg_label_free"] == pytest.approx((iou[1] + iou[2]) / 2)
    assert list(result.per_class()) == ["background", "horse"]
    assert "C-mIoU" in result.table()


@pytest.mark.parametrize("key", ["classes", "coexistence"])
def test_unknown_class_names_are_one_line_with_the_nearest_name(tmp_path: Path, key: str) -> None:
    config = replace(EvalConfig(), **{key: ("hrose",)})
    with pytest.raises(UserError, match=rf"eval\.{key}: there is no class 'hrose' \(did you mean 'horse'\?\)"):
        run(ColourNet(), make_dataset(tmp_path, block_masks()), eval=config)


def test_other_classes_than_the_networks_are_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, block_masks(), classes=("dog", "cat", "horse"))
    with pytest.raises(UserError, match="dog, cat, horse"):
        run(ColourNet(), dataset)


def test_set_without_masks_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    with pytest.raises(UserError, match="has no masks"):
        run(ColourNet(), ImageDataset(CLASSES, ["a"], [image]))


def test_limit_takes_images_evenly_from_the_set(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [np.full((8 * (i + 1), 8), i % 4, np.uint8) for i in range(6)])
    model = ColourNet()
    seen: list[tuple[int, int]] = []
    result = run(model, dataset, limit=3, progress=lambda done, total: seen.append((done, total)))
    assert result.images == 3
    assert [shape[2] for shape, _ in model.calls] == [8, 24, 40]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert run(ColourNet(), dataset, limit=100).images == 6
    with pytest.raises(UserError, match="nothing to evaluate"):
        run(ColourNet(), dataset, limit=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (5, 3)])
def test_images_smaller_than_a_patch_are_evaluated(
    tmp_path: Path, tiny_network: CoSANet, size: tuple[int, int]
) -> None:
    result = run(tiny_network, make_dataset(tmp_path, [np.ones(size, np.uint8)]))
    assert 0 <= result.label_free.miou <= 100


def test_image_of_ignored_pixels_alone_changes_nothing(tmp_path: Path) -> None:
    result = run(ColourNet(), make_dataset(tmp_path, [np.full((16, 16), 255, np.uint8)]))
    assert math.isnan(result.label_free.miou)
    assert "-" in result.table()


def test_table_names_classes_and_both_kinds_of_segmentation(tmp_path: Path) -> None:
    result = run(ColourNet(), make_dataset(tmp_path, block_masks()))
    lines = result.table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:6] == ["IoU", "in", "%", "label-free", "label-aware", "best"]
    by_name = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert float(by_name["cat"][0]) == pytest.approx(result.label_free.iou[1], abs=0.006)
    assert float(by_name["mIoU"][1]) == pytest.approx(result.label_aware.miou, abs=0.006)
    assert result.cam.best_threshold != 0.5
    assert float(by_name["threshold"][2]) == pytest.approx(result.cam.best_threshold, abs=6e-4)
    assert float(by_name["threshold"][3]) == pytest.approx(0.3, abs=6e-4)


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, tiny_network: CoSANet) -> tuple[Path, Path]:
    """(checkpoint, dataset root in the VOC layout)."""
    root = tmp_path / "set"
    folders = {name: root / name for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    masks = block_masks()
    for index, mask in enumerate(masks):
        Image.fromarray(COLOURS[np.where(mask == 255, 0, mask)]).save(folders["JPEGImages"] / f"{index}.jpg")
        Image.fromarray(mask).save(folders["SegmentationClass"] / f"{index}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (folders["ImageSets/Segmentation"] / "val.txt").write_text("0\n1\n2\n")
    (folders["ImageSets/Segmentation"] / "half.txt").write_text("1\n")
    model = ModelConfig(backbone="test_vit", weights="none", aux_layer=-2, decoder_width=16)
    config = Config(model=model)
    config = replace(
        config,
        data=replace(config.data, root=str(root), mean=MEAN, std=STD),
        eval=EvalConfig(scales=(1.0,)),
        optim=replace(config.optim, cotrain_after=5),
    )
    path = tmp_path / "checkpoint.pt"
    state = {
        "config": config_to_dict(config),
        "classes": list(CLASSES),
        "iteration": 7,
        "student": tiny_network.state_dict(),
        "teacher": {key: value * 1.5 for key, value in tiny_network.state_dict().items()},
        "thresholds": [{"value": torch.tensor(0.31)}, {"value": torch.tensor(0.43)}],
    }
    checkpoint.save(path, state)
    return path, root


def test_evaluate_prints_both_networks_and_writes_every_figure(
    saved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_network: CoSANet
) -> None:
    path, root = saved
    output = tmp_path / "new" / "figures.json"
    assert evaluate.main([str(path), "eval.scales=[1.0, 0.5]", "--json", str(output), "eval.flip=false"]) == 0
    printed = capsys.readouterr().out
    assert "student (ON) at iteration 7, 3 images of val" in printed
    assert "teacher (AN) at iteration 7" in printed
    assert printed.count("label-aware") >= 2
    record = json.loads(output.read_text())
    assert record["scales"] == [1.0, 0.5]
    assert record["flip"] is False
    assert record["student"]["summary"]["cam_threshold"] == pytest.approx(0.31)
    dataset = make_dataset(tmp_path / "png", block_masks())
    dataset._images = tuple(root / "JPEGImages" / f"{index}.jpg" for index in range(3))
    direct = run(
        tiny_network,
        dataset,
        eval=EvalConfig(scales=(1.0, 0.5), flip=False),
        teacher=TeacherConfig(),
        thresholds=(0.31, 0.43),
    )
    assert record["student"]["summary"]["seg_label_free"] == pytest.approx(direct.label_free.miou)
    assert record["teacher"]["summary"] != record["student"]["summary"]
    assert set(record["teacher"]["per_class"]) == {"background", *CLASSES}


def test_evaluate_takes_a_network_a_split_and_a_limit(
    saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(saved[0]), "--network", "teacher", "--split", "half"]) == 0
    printed = capsys.readouterr().out
    assert "1 images of half" in printed
    assert "student" not in printed
    assert evaluate.main([str(saved[0]), "--network", "student", "--limit", "2"]) == 0
    assert "2 images of val" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.aux_layer=-1"], "belongs to the training"),
        (["eval.scale=[1.0]"], "did you mean"),
        (["eval.coexistence=[hrose]"], "hrose"),
        (["--json", "{root}"], "cannot be written"),
        (["data.root=/nowhere"], "/nowhere"),
    ],
)
def test_evaluate_reports_mistakes_in_one_line(saved: tuple[Path, Path], arguments: list[str], message: str) -> None:
    filled = [argument.format(root=saved[1]) for argument in arguments]
    with pytest.raises(UserError, match=message) as caught:
        evaluate.main([str(saved[0]), *filled])
    assert "\n" not in str(caught.value)


def test_json_is_checked_before_the_work(saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Callable:
        raise AssertionError("evaluated before the output was checked")

    monkeypatch.setattr(evaluate, "evaluate", never)
    with pytest.raises(UserError, match="cannot be written"):
        evaluate.main([str(saved[0]), "--json", str(saved[1])])
