"""The contract of both pipelines: a stream that depends on the seed alone, goes on anywhere, and never sees a mask."""

import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
HAS_DALI = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
Equal = Callable[[Batch, Batch], bool]
Take = Callable[..., list[Batch]]


@pytest.fixture
def dataset(synthetic_root: Path) -> ImageDataset:
    return open_dataset("synthetic", synthetic_root, "train")


@pytest.fixture
def take(open_stream: Callable[..., Iterable[Batch]]) -> Take:
    """take(dataset, n, ...): the first n batches of a new stream."""
    return lambda dataset, count, *arguments, **options: list(
        islice(open_stream(dataset, *arguments, **options), count)
    )


def test_batches_have_the_promised_form(dataset: ImageDataset, take: Take) -> None:
    batch = take(dataset, 1)[0]
    assert batch.weak.shape == batch.strong.shape == (5, 3, 48, 48)
    assert batch.weak.dtype == batch.strong.dtype == batch.labels.dtype == torch.float32
    assert batch.labels.shape == (5, 5)
    assert (batch.valid.shape, batch.valid.dtype, batch.truth) == ((5, 48, 48), torch.bool, None)
    for id, row in zip(batch.ids, batch.labels, strict=True):
        assert np.array_equal(dataset.labels(dataset.ids.index(id)), row.numpy())


def test_padding_is_black_where_asked_for_and_changes_nothing_else(dataset: ImageDataset, take: Take) -> None:
    black = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    pairs = [*zip(take(dataset, 3), take(dataset, 3, padding="black"), strict=True)]
    assert not all(plain.valid.all() for plain, _ in pairs)
    for plain, other in pairs:
        outside = ~plain.valid[:, None].expand_as(plain.weak)
        for view, changed in ((plain.weak, other.weak), (plain.strong, other.strong)):
            assert torch.equal(view[~outside], changed[~outside])
            assert (view[outside] == 0).all()
            torch.testing.assert_close(changed[outside], black.view(1, 3, 1, 1).expand_as(changed)[outside])


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 2, "prefetch": 5}])
def test_threads_and_prefetching_do_not_change_the_stream(
    dataset: ImageDataset, take: Take, equal: Equal, options: dict[str, int]
) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert all(equal(a, b) for a, b in zip(take(dataset, 5), take(dataset, 5, **options), strict=True))
    assert torch.equal(torch.get_rng_state(), before), "the pipeline must not touch the global generator"


def test_resuming_from_a_position_continues_the_stream(dataset: ImageDataset, take: Take, equal: Equal) -> None:
    whole, rest = take(dataset, 6), take(dataset, 3, start=15)
    assert all(equal(a, b) for a, b in zip(whole[3:], rest, strict=True))


def test_iterating_again_begins_again(
    dataset: ImageDataset, open_stream: Callable[..., Iterable[Batch]], equal: Equal
) -> None:
    pipeline = open_stream(dataset)
    first, second = (list(islice(pipeline, 3)) for _ in range(2))
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_see_together_what_one_sees(dataset: ImageDataset, take: Take, ranks: int) -> None:
    """Over several epochs; each image of an epoch exactly once."""
    whole = take(dataset, 6, 6)
    parts = [take(dataset, 6, 6, rank=rank, ranks=ranks) for rank in range(ranks)]
    for number, batch in enumerate(whole):
        pieces = [part[number] for part in parts]
        assert [id for piece in pieces for id in piece.ids] == batch.ids
        assert torch.equal(torch.cat([piece.strong for piece in pieces]), batch.strong)
        assert torch.equal(torch.cat([piece.valid for piece in pieces]), batch.valid)
    ids = [id for batch in whole for id in batch.ids]
    assert [sorted(ids[epoch : epoch + 12]) for epoch in (0, 12, 24)] == [sorted(dataset.ids)] * 3


def test_training_never_opens_a_mask(dataset: ImageDataset, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageDataset, "_read_mask", lambda *_: pytest.fail("a mask was opened"))
    assert take(dataset, 2)[0].truth is None


def test_truth_where_there_are_no_masks_is_an_error(make_voc: Callable[..., Path], take: Take) -> None:
    dataset = open_dataset("voc", make_voc({"a": Image.new("RGB", (9, 9))}, {"a": ["cat"]}), "train")
    assert not dataset.has_masks
    assert len(take(dataset, 1)) == 1
    with pytest.raises(UserError, match="no masks"):
        take(dataset, 1, with_truth=True)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_unreadable_image_is_one_line_in_the_main_process(
    make_voc: Callable[..., Path], take: Take, threads: int
) -> None:
    images = {"good": Image.new("RGB", (9, 9)), "bad": b"\xff\xd8 not a picture"}
    root = make_voc(images, {"good": ["cat"], "bad": ["dog"]})
    with pytest.raises(UserError) as caught:
        take(open_dataset("voc", root, "train"), 3, threads=threads)
    assert "bad.jpg" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_pixel_and_8000_pixel_images_go_through(make_voc: Callable[..., Path], take: Take) -> None:
    images = {"dot": Image.new("RGB", (1, 1)), "line": Image.new("RGB", (8000, 1)), "grey": Image.new("L", (30, 8000))}
    (batch,) = take(open_dataset("voc", make_voc(images, {id: [] for id in images}), "train"), 1, 6)
    assert set(batch.ids) == set(images)
    assert batch.weak.isfinite().all()


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"start": -1}, {"seed": -1}, {"threads": -1}, {"rank": 2, "ranks": 2}]
)
def test_impossible_arguments_are_named(
    dataset: ImageDataset, open_stream: Callable[..., Iterable[Batch]], pipeline: str, wrong: dict[str, int]
) -> None:
    name = next(iter(wrong))
    with pytest.raises(ValueError, match="workers" if (name, pipeline) == ("threads", "torch") else name):
        open_stream(dataset, **{"batch_size": 2, **wrong})


def test_a_program_that_ends_in_mid_stream_leaves_at_once(synthetic_root: Path) -> None:
    """However it ends, with either pipeline. What takes long, the imports, is done once; a child is forked for each."""
    # Python's own handler first: a shell's background jobs ignore the signal.
    interrupt = "signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), 2); time.sleep(9)"
    program = f"""
import gc, os, signal, time, torch
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline
from cosa_fast.data_pipeline.views.parameters import AugmentConfig
common = (open_dataset("synthetic", {str(synthetic_root)!r}, "train"), AugmentConfig(crop_size=48), 2, 0)
makers = [lambda: TorchPipeline(*common, workers=2)]
if {HAS_DALI}:
    from cosa_fast.data_pipeline.dali.pipeline import DaliPipeline
    makers.append(lambda: DaliPipeline(*common, device=torch.device("cpu"), threads=2))
gc.freeze()  # else the end of every child goes through all that was imported
children = []
for make in makers:
    for end in {["raise SystemExit(3)", interrupt, "1 / 0"]}:
        children.append(os.fork())
        if not children[-1]:
            signal.alarm(40)
            stream = iter(make())
            next(stream)
            exec(end)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=90)
    assert done.stdout.split() == ["3", "-2", "1"] * (1 + HAS_DALI), done.stderr
    assert done.stderr.count("ZeroDivisionError") == 1 + HAS_DALI
    assert "DataLoader" not in done.stderr
