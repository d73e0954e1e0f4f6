"""The stream of batches: the same for any number of workers, resumable, blind to masks, clear in its errors."""

import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline
from cosa_fast.data_pipeline.views.parameters import AugmentConfig
from cosa_fast.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = AugmentConfig(crop_size=48)


@pytest.fixture
def dataset(synthetic_root: Path) -> ImageDataset:
    return open_dataset("synthetic", synthetic_root, "train")


def take(dataset: ImageDataset, count: int, batch_size: int = 5, **options: int) -> list[Batch]:
    stream = iter(TorchPipeline(dataset, CONFIG, batch_size, 7, **options))
    return list(islice(stream, count))


def equal(a: Batch, b: Batch) -> bool:
    tensors = ((a.weak, b.weak), (a.strong, b.strong), (a.labels, b.labels), (a.valid, b.valid))
    return a.ids == b.ids and all(torch.equal(x, y) for x, y in tensors)


def test_batches_have_the_promised_form(dataset: ImageDataset) -> None:
    batch = take(dataset, 1)[0].to("cpu")
    assert batch.weak.shape == batch.strong.shape == (5, 3, 48, 48)
    assert batch.weak.dtype == batch.strong.dtype == batch.labels.dtype == torch.float32
    assert batch.labels.shape == (5, 5)
    assert (batch.valid.shape, batch.valid.dtype, batch.truth) == ((5, 48, 48), torch.bool, None)
    for id, row in zip(batch.ids, batch.labels, strict=True):
        assert np.array_equal(dataset.labels(dataset.ids.index(id)), row.numpy())


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_stream(dataset: ImageDataset, workers: int) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone, together = take(dataset, 4), take(dataset, 4, workers=workers)
    assert all(equal(a, b) for a, b in zip(alone, together, strict=True))
    assert torch.equal(torch.get_rng_state(), before), "the pipeline must not touch the global generator"


def test_an_epoch_shows_every_image_once(dataset: ImageDataset) -> None:
    ids = [id for batch in take(dataset, 6, batch_size=4) for id in batch.ids]
    assert sorted(ids[:12]) == sorted(ids[12:]) == sorted(dataset.ids)


def test_resuming_from_a_position_continues_the_stream(dataset: ImageDataset) -> None:
    whole, rest = take(dataset, 6), take(dataset, 3, start=15)
    assert all(equal(a, b) for a, b in zip(whole[3:], rest, strict=True))


def test_training_never_opens_a_mask(synthetic_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(synthetic_root, root)
    expected = take(open_dataset("synthetic", root, "train"), 3)
    shutil.rmtree(root / "SegmentationClass")
    dataset = open_dataset("synthetic", root, "train")
    assert not dataset.has_masks
    assert all(equal(a, b) for a, b in zip(expected, take(dataset, 3), strict=True))
    with pytest.raises(UserError, match="no masks"):
        next(iter(TorchPipeline(dataset, CONFIG, 2, 0, with_truth=True)))


def test_truth_is_aligned_with_the_image(make_voc: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    masks = {f"i{k}": np.kron(rng.integers(0, 2, (5, 6), np.uint8), np.ones((16, 16), np.uint8)) for k in range(4)}
    images = {id: Image.fromarray(mask * 255).convert("RGB") for id, mask in masks.items()}
    root = make_voc(images, {id: ["aeroplane"] for id in masks}, masks)
    config = AugmentConfig(crop_size=64, blur_probability=0, strong=False, mean=(0, 0, 0), std=(1, 1, 1))
    pipeline = TorchPipeline(open_dataset("voc", root, "train"), config, 4, 0, with_truth=True)
    for batch in islice(pipeline, 4):
        assert batch.truth is not None
        assert torch.equal(batch.truth == 255, ~batch.valid)
        assert ((batch.weak[:, 0] > 0.5) == (batch.truth == 1))[batch.valid].float().mean() > 0.96


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_line_in_the_main_process(make_voc: Callable[..., Path], workers: int) -> None:
    images = {"good": Image.new("RGB", (9, 9)), "bad": b"\xff\xd8 not a picture"}
    root = make_voc(images, {"good": ["cat"], "bad": ["dog"]})
    with pytest.raises(UserError) as caught:
        take(open_dataset("voc", root, "train"), 3, workers=workers)
    assert "bad.jpg" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_workers_ignore_the_groups_signals_and_end_with_the_stream(dataset: ImageDataset) -> None:
    stream = iter(TorchPipeline(dataset, CONFIG, 2, 0, workers=2))
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
    assert len(list(islice(stream, 12))) == 12
    stream.close()  # type: ignore[attr-defined]
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


# Python's handler again first: a shell's background jobs ignore the signal.
INTERRUPT = "signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), 2); time.sleep(9)"


@pytest.mark.parametrize("end", ["raise SystemExit(3)", INTERRUPT, "1 / 0"])
def test_a_program_that_ends_in_mid_stream_leaves_at_once(synthetic_root: Path, end: str) -> None:
    program = f"""
import os, signal, time
from cosa_fast.data_pipeline.datasets import open_dataset
from cosa_fast.data_pipeline.torch_pipeline import AugmentConfig, TorchPipeline
dataset = open_dataset("synthetic", {str(synthetic_root)!r}, "train")
stream = iter(TorchPipeline(dataset, AugmentConfig(crop_size=48), 2, 0, workers=2))
next(stream)
{end}
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=25)
    assert done.returncode != 0
    assert "DataLoader" not in done.stderr


def test_a_killed_worker_is_explained(synthetic_root: Path) -> None:
    """In a process of its own: torch's signal handler raises wherever the main thread happens to be."""
    program = f"""
import multiprocessing, os, threading
from collections import deque
from cosa_fast.data_pipeline.datasets import open_dataset
from cosa_fast.data_pipeline.torch_pipeline import AugmentConfig, TorchPipeline
from cosa_fast.errors import UserError
dataset = open_dataset("synthetic", {str(synthetic_root)!r}, "train")
stream = iter(TorchPipeline(dataset, AugmentConfig(crop_size=48), 2, 0, workers=1))
next(stream)
threading.Timer(0.5, multiprocessing.active_children()[0].kill).start()
try:
    deque(stream, maxlen=0)
except UserError as error:
    os.write(1, str(error).encode())
    os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert "data.workers process was killed" in done.stdout, done.stderr


def test_one_pixel_and_8000_pixel_images_go_through(make_voc: Callable[..., Path]) -> None:
    images = {"dot": Image.new("RGB", (1, 1)), "line": Image.new("RGB", (8000, 1)), "grey": Image.new("L", (30, 8000))}
    root = make_voc(images, {id: [] for id in images})
    batch = take(open_dataset("voc", root, "train"), 1, batch_size=6)[0]
    assert set(batch.ids) == set(images)
    assert batch.weak.isfinite().all()


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"start": -1}, {"workers": -1}])
def test_impossible_arguments_are_named(dataset: ImageDataset, wrong: dict[str, int]) -> None:
    arguments = {"batch_size": 2, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TorchPipeline(dataset, CONFIG, arguments.pop("batch_size"), 0, **arguments)


def test_real_images_stream(voc_animals: Path) -> None:
    dataset = open_dataset("voc", voc_animals, "train_aug")
    batch = next(iter(TorchPipeline(dataset, AugmentConfig(), 4, 0, with_truth=True)))
    assert batch.weak.shape == (4, 3, 448, 448)
    assert batch.truth is not None
    for labels, truth in zip(batch.labels, batch.truth, strict=True):
        seen = set(truth.unique().tolist()) - {0, 255}
        assert seen <= {int(c) + 1 for c in labels.nonzero()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_are_the_same(workers: int, synthetic_root: Path) -> None:
    dataset = open_dataset("voc", synthetic_root, "train")
    usual, pinned = (
        next(iter(TorchPipeline(dataset, AugmentConfig(crop_size=64), 4, 0, workers=workers, pinned=flag)))
        for flag in (False, True)
    )
    assert pinned.strong.is_pinned()
    assert pinned.valid.is_pinned()
    assert torch.equal(pinned.strong, usual.strong)
    assert pinned.ids == usual.ids
