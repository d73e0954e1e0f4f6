"""The portable pipeline: truth beside its image, worker processes that obey their parent alone, pinned memory."""

import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline, _say_unless_connection_is_lost
from cosa_fast.data_pipeline.views.parameters import AugmentConfig

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = AugmentConfig(crop_size=48)


@pytest.fixture
def dataset(synthetic_root: Path) -> ImageDataset:
    return open_dataset("synthetic", synthetic_root, "train")


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


def test_workers_ignore_the_groups_signals_and_end_with_the_stream(synthetic_root: Path) -> None:
    """Every thread of a worker is deaf, those that libraries start in it as well, but the one that waits for SIGTERM:
    any other that takes a signal would end the worker."""
    program = f"""
import multiprocessing, re, subprocess
from pathlib import Path
from itertools import islice
import cosa_fast.run.training
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline, _say_unless_connection_is_lost
from cosa_fast.data_pipeline.views.parameters import AugmentConfig
dataset = open_dataset("synthetic", {str(synthetic_root)!r}, "train")
stream = iter(TorchPipeline(dataset, AugmentConfig(crop_size=48), 2, 0, workers=2))
next(stream), next(stream)
workers = multiprocessing.active_children()
for worker in workers:
    threads = [path.read_text() for path in Path(f"/proc/{{worker.pid}}/task").glob("*/status")]
    blocked = [int(re.search("SigBlk:\\s*(\\w+)", text)[1], 16) for text in threads]
    assert all(mask & 1 << 1 for mask in blocked)
    assert sum(not mask & 1 << 14 for mask in blocked) <= 1
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
print(len(workers), len(list(islice(stream, 12))))
stream.close()
for worker in workers:
    worker.join(10)
print([worker.is_alive() for worker in workers])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 12\n[False, False]\n", done.stderr


def test_a_killed_worker_is_explained(synthetic_root: Path) -> None:
    """In a process of its own, where torch has not set a handler of SIGCHLD yet; none may be, for it would raise
    wherever the main thread happens to be."""
    program = f"""
import multiprocessing, os, signal, threading
from collections import deque
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline, _say_unless_connection_is_lost
from cosa_fast.data_pipeline.views.parameters import AugmentConfig
from cosa_fast.errors import UserError
handled, handle = [], signal.signal
signal.signal = lambda number, handler: handled.append(number) or handle(number, handler)
dataset = open_dataset("synthetic", {str(synthetic_root)!r}, "train")
stream = iter(TorchPipeline(dataset, AugmentConfig(crop_size=48), 2, 0, workers=1))
next(stream)
assert signal.SIGTERM in handled and signal.SIGCHLD not in handled, handled
threading.Timer(0.5, multiprocessing.active_children()[0].kill).start()
try:
    deque(stream, maxlen=0)
except UserError as error:
    os.write(1, str(error).encode())
    os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert "data.workers process was killed" in done.stdout, done.stderr


@pytest.mark.parametrize(("error", "said"), [(ConnectionResetError(104, "reset"), False), (ValueError("bad"), True)])
def test_a_worker_is_silent_of_its_lost_parent_alone(
    error: Exception, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    _say_unless_connection_is_lost(type(error), error, None)
    assert bool(capsys.readouterr().err) == said


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
