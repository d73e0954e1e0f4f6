"""What a report draws of an evaluation: counts that agree with the scores, alone and shared out over ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_support import ColourNet, block_masks, evaluate, make_dataset
from sklearn.metrics import confusion_matrix

from cosa_fast.distributed import ALONE
from cosa_fast.evaluation.gathering import finish
from cosa_fast.evaluation.metrics import ConfusionMatrix
from cosa_fast.evaluation.observed import BINS, OUTCOMES, Observed, Observer
from cosa_fast.evaluation.result import EvalResult


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> EvalResult:
    return evaluate(ColourNet(confuse=(1, 2)), make_dataset(tmp_path_factory.mktemp("set"), block_masks()))


@pytest.fixture
def observed(result: EvalResult) -> Observed:
    assert result.observed is not None
    return result.observed


def test_the_matrix_holds_every_pixel_with_a_truth(observed: Observed, result: EvalResult) -> None:
    truth = np.concatenate([mask.ravel() for mask in block_masks()])
    assert observed.confusion.sum() == (truth != 255).sum()
    assert observed.confusion.sum(1).tolist() == np.bincount(truth[truth != 255], minlength=4).tolist()
    assert observed.confusion[1, 2] > 0, "cat and dog are taken for each other"
    hits = observed.confusion.diagonal().double()
    iou = hits / (observed.confusion.sum(0) + observed.confusion.sum(1) - hits)
    assert (100 * iou).tolist() == pytest.approx(list(result.label_free.iou))


def test_quality_is_each_images_own(observed: Observed) -> None:
    assert observed.images == (0, 1, 2)
    assert observed.quality[2] == 100.0, "nothing but background, and seen as such"
    assert observed.quality[0] < 50, "the cat is taken for a dog"


def test_confidences_are_those_of_images_with_a_class(observed: Observed, result: EvalResult) -> None:
    first, second, _ = block_masks()
    for name in ("cam", "cam_aux"):
        counts = observed.confidence[name]
        assert counts.shape == (BINS, len(OUTCOMES))
        assert counts.sum() == first.size + second.size
        assert counts[:, OUTCOMES.index("unknown")].sum() == (second == 255).sum()
        assert counts[:, OUTCOMES.index("background")].sum() == (first == 0).sum() + (second == 0).sum()
    assert result.cam.at_threshold is not None


def test_the_sweep_is_that_of_the_best_threshold(observed: Observed, result: EvalResult) -> None:
    best = int(np.argmax(observed.sweep["cam"]))
    assert observed.sweep["cam"][best] == pytest.approx(result.cam.best.miou)
    assert observed.thresholds[best] == pytest.approx(result.cam.best_threshold)


def test_outcomes_of_pixels() -> None:
    observer, matrix = Observer([7], torch.device("cpu")), ConfusionMatrix(3)
    confidence = torch.tensor([[[0.0, 0.5, 1.0, 0.5]]])
    category, truth = torch.tensor([[[1, 1, 2, 2]]]), torch.tensor([[[1, 0, 255, 1]]], dtype=torch.uint8)
    observer.add_map("cam", confidence, category, truth)
    observer.add_quality([0], matrix.add(torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 0]])))
    finish(observer.counted(), ALONE)
    found = observer.observed(matrix.counts)
    rows = {name: found.confidence["cam"][:, place].nonzero()[:, 0].tolist() for place, name in enumerate(OUTCOMES)}
    assert rows == {"right": [0], "background": [BINS // 2], "wrong": [BINS // 2], "unknown": [BINS - 1]}
    assert found.quality == (50.0,)
    assert found.confusion.tolist() == confusion_matrix([1, 0, 0], [1, 1, 0], labels=[0, 1, 2]).tolist()
    assert "cam_aux" not in found.confidence


def test_ranks_add_up() -> None:
    parts = [Observer([3, 5], torch.device("cpu")) for _ in range(2)]
    for position, observer in enumerate(parts):
        counts = ConfusionMatrix(2).add(torch.tensor([[1]]), torch.tensor([[position]]))
        observer.add_quality([position], counts)
    for own, other in zip(*(observer.counted() for observer in parts), strict=True):
        own.counts += other.counts
    assert parts[0].observed(torch.zeros(2, 2)).quality == (0.0, 100.0)


def test_it_does_not_count_in_comparisons(result: EvalResult, tmp_path: Path) -> None:
    again = evaluate(ColourNet(confuse=(1, 2)), make_dataset(tmp_path, block_masks()))
    assert again == result
    assert "observed" not in str(result)
