"""Segmentations through the CRF: what takes part, at which size, in how many processes; and what evaluation makes of
it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_support import CLASSES, MEAN, STD, ColourNet, block_masks, make_dataset
from torch import Tensor

from cosa_fast.config.schema import Config, DataConfig, EvalConfig
from cosa_fast.data_pipeline.evaluation_stream import BY_PIL
from cosa_fast.errors import UserError
from cosa_fast.evaluation.cleaning import Cleaner, check_methods, clean, likely_classes
from cosa_fast.evaluation.crf import crf_inference
from cosa_fast.evaluation.crf_scores import CrfResult, score_crf

CPU = torch.device("cpu")


def disc(height: int = 20, width: int = 24, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """(probabilities, image, labels): a disc of class 2 in a colour of its own, a fifth of the pixels called otherwise;
    no other class takes part."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    labels = 2 * ((y - height / 2) ** 2 + (x - width / 2) ** 2 < (height / 3) ** 2).long()
    wrong = torch.rand(height, width, generator=generator) < 0.2
    probabilities = torch.full((classes, height, width), 0.001)
    probabilities[[0, 2]] = 0.3
    probabilities.scatter_(0, torch.where(wrong, 2 - labels, labels)[None], 0.7)
    image = torch.tensor([[60, 120, 60], [0, 0, 0], [170, 90, 40]], dtype=torch.uint8)[labels].permute(2, 0, 1)
    return probabilities, image, labels


def cleaned(probabilities: Tensor, image: Tensor, method: str, side: int | None = None) -> np.ndarray:
    classes = likely_classes(probabilities)
    return clean(probabilities[classes], classes, image, method, side).labels


@pytest.mark.parametrize("method", ["ours", "pydensecrf"])
def test_labels_follow_the_image_and_unlikely_classes_change_nothing(method: str) -> None:
    if method == "pydensecrf":
        pytest.importorskip("pydensecrf")
    probabilities, image, labels = disc()
    assert likely_classes(probabilities).tolist() == [0, 2]
    found = cleaned(probabilities, image, method)
    assert np.array_equal(found, labels.numpy())
    every = crf_inference(probabilities, image, method={"ours": "exact", "pydensecrf": "lattice"}[method]).argmax(0)
    assert np.array_equal(found, every.numpy())


def test_a_sure_image_is_left_alone() -> None:
    probabilities = torch.tensor([0.001, 0.999]).view(2, 1, 1).expand(2, 900, 900)
    found = cleaned(probabilities, torch.zeros(3, 900, 900, dtype=torch.uint8), "ours")
    assert (found == 1).all()


def test_long_images_are_refused_on_a_cpu_before_any_work_and_shrunk_if_asked() -> None:
    probabilities, image, _ = disc(400, 500)
    with pytest.raises(UserError, match=r"500x400 take about \d+ minutes .* --crf-side (\d+)") as refused:
        cleaned(probabilities, image, "ours")
    side = int(str(refused.value).split("--crf-side ")[1].split(",")[0])
    assert 40 < side < 200
    small = cleaned(probabilities, image, "ours", side=30)
    _, _, labels = disc(400, 500)
    assert small.shape == (400, 500)
    assert (small == labels.numpy()).mean() > 0.97


def test_processes_find_what_one_finds_in_the_order_of_the_images() -> None:
    problems = [disc(16, width)[:2] for width in (16, 24, 20, 28, 18)]
    outcomes = []
    for processes in (1, 2):
        with Cleaner(["ours"], processes, CPU) as cleaner:
            cleaner.processes = processes  # even on a single core
            items = ((number, *problem) for number, problem in enumerate(problems))
            outcomes.append([(tag, found["ours"].labels) for tag, found in cleaner.map(items)])
    assert [tag for tag, _ in outcomes[1]] == list(range(5))
    for (_, alone), (_, together) in zip(*outcomes, strict=True):
        assert np.array_equal(alone, together)


def test_a_missing_package_is_named_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosa_fast.evaluation.cleaning.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--crf pydensecrf: .*\[crf\]"):
        check_methods(["pydensecrf"])
    check_methods(["ours"])


def scored(root: Path, methods: list[str], has_masks: bool = True) -> CrfResult:
    dataset = make_dataset(root, block_masks())
    dataset.has_masks = has_masks
    config = Config(data=DataConfig(mean=MEAN, std=STD), eval=EvalConfig(scales=(1.0,), flip=False, batch_size=2))
    config = replace(config, run=replace(config.run, precision="fp32"))
    seen: list[tuple[int, int]] = []
    with Cleaner(methods, 1, CPU, side=32) as cleaner:
        result = score_crf(
            ColourNet(), dataset, [0, 1, 2], config, (0, 1, 2, 3), cleaner, BY_PIL, lambda *done: seen.append(done)
        )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    return result


def test_an_evaluation_has_a_column_per_method_its_time_and_how_they_agree(tmp_path: Path) -> None:
    pytest.importorskip("pydensecrf")
    result = scored(tmp_path, ["ours", "pydensecrf"])
    summary = result.summary()
    for method in ("ours", "pydensecrf"):
        assert summary[f"seg_crf_{method}"] > 50
        assert 0 < summary[f"crf_{method}_changed"] < 0.5
        assert summary[f"crf_{method}_seconds"] > 0
    assert 0.8 < summary["crf_agreement"] <= 1
    lines = result.table().splitlines()
    assert lines[1].split() == ["IoU", "in", "%", "free", "ours", "pydensecrf"]
    assert [line.split()[0] for line in lines[3:7]] == ["background", *CLASSES]
    assert "both agree on" in lines[-1]
    assert max(map(len, lines)) <= 100


def test_without_masks_only_what_needs_none_is_told(tmp_path: Path) -> None:
    result = scored(tmp_path, ["ours"], has_masks=False)
    assert set(result.summary()) == {"crf_ours_changed", "crf_ours_seconds"}
    assert result.table().startswith("CRF ours: ")
