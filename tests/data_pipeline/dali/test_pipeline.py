"""The DALI pipeline: images, labels and crops of the portable one, whoever decodes; memory and threads of its own."""

import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

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

pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra [dali])")

from cosa_fast.data_pipeline.dali import feed as dali_feed
from cosa_fast.data_pipeline.dali import pipeline as dali_pipeline
from cosa_fast.data_pipeline.dali.operations import decode
from cosa_fast.data_pipeline.dali.pipeline import DaliPipeline

CONFIG = AugmentConfig(crop_size=48)


@pytest.fixture
def dataset(synthetic_root: Path) -> ImageDataset:
    return open_dataset("synthetic", synthetic_root, "train")


def take(dataset: ImageDataset, count: int, batch_size: int = 5, device: str = "cpu", **options: Any) -> list[Batch]:
    stream = iter(DaliPipeline(dataset, CONFIG, batch_size, 7, device=torch.device(device), **options))
    return list(islice(stream, count))


def portable(dataset: ImageDataset, count: int, batch_size: int = 5, **options: Any) -> list[Batch]:
    return list(islice(TorchPipeline(dataset, CONFIG, batch_size, 7, **options), count))


def steps(a: Batch, b: Batch) -> float:
    """Mean difference of the weak views in 8-bit steps."""
    scale = 255 * torch.tensor(CONFIG.std).view(3, 1, 1)
    return float(((a.weak.cpu() - b.weak.cpu()).abs() * scale).mean())


def test_everything_but_colours_equals_the_portable_pipeline(dataset: ImageDataset, device: torch.device) -> None:
    pairs = zip(
        take(dataset, 12, with_truth=True, device=str(device)), portable(dataset, 12, with_truth=True), strict=True
    )
    for ours, other in pairs:
        assert all(t.device.type == device.type for t in (ours.weak, ours.strong, ours.labels, ours.valid))
        ours = ours.to("cpu")
        assert ours.ids == other.ids
        for name in ("weak", "strong", "labels", "valid", "truth"):
            one, two = getattr(ours, name), getattr(other, name)
            assert (one.shape, one.dtype) == (two.shape, two.dtype)
        assert torch.equal(ours.labels, other.labels)
        assert torch.equal(ours.valid, other.valid)
        assert torch.equal(ours.truth, other.truth)  # type: ignore[arg-type]
        for view in (ours.weak, ours.strong):
            assert view.is_contiguous()
            assert (view.permute(0, 2, 3, 1)[~ours.valid] == 0).all()
        assert steps(ours, other) < 0.6


def test_crops_land_in_the_same_pixels(make_voc: Callable[..., Path], device: torch.device) -> None:
    """Hard edges: a shift or a mirror of one pixel would be seen."""
    rng = np.random.default_rng(0)
    images = {
        f"i{k}": Image.fromarray(np.kron(rng.integers(0, 2, (9, 11), np.uint8), np.full((8, 8), 255, np.uint8)))
        for k in range(5)
    }
    dataset = open_dataset("voc", make_voc(images, {id: ["cat"] for id in images}, suffix=".png"), "train")
    config = AugmentConfig(crop_size=64, blur_probability=0, strong=False)
    ours = DaliPipeline(dataset, config, 5, 0, device=device)
    for a, b in islice(zip(ours, TorchPipeline(dataset, config, 5, 0), strict=True), 8):
        assert (a.weak.cpu() - b.weak).abs().max() * 255 * max(config.std) < 4


def test_a_batch_outlives_those_after_it(
    dataset: ImageDataset, device: torch.device, equal: Callable[[Batch, Batch], bool]
) -> None:
    """Batches are DALI's own memory: it must not be used again while somebody holds them."""
    stream = iter(DaliPipeline(dataset, CONFIG, 4, 0, device=device, prefetch=1))
    held = [next(stream) for _ in range(3)]
    copies = [batch.map(torch.clone) for batch in held]
    for _ in range(20):
        next(stream)
    assert all(equal(a, b) for a, b in zip(held, copies, strict=True))
    stream.close()  # type: ignore[attr-defined]
    assert all(equal(a, b) for a, b in zip(held, copies, strict=True))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def test_every_kind_of_file_is_read_as_pil_reads_it(tmp_path: Path, synthetic_root: Path) -> None:
    """Same pixels, whoever decodes: with nothing but a crop of the native size both pipelines agree exactly."""
    source = Image.open(next((synthetic_root / "JPEGImages").glob("*.jpg"))).convert("RGB").crop((0, 0, 48, 40))
    alpha = source.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(source.size))
    palette = source.quantize(16)
    palette.info["transparency"] = 3
    deep = Image.fromarray(np.asarray(source.convert("L"), np.uint16) * 257)
    files: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "plain.jpg": (source, {}),
        "progressive.jpg": (source, {"progressive": True}),
        "full_chroma.jpg": (source, {"subsampling": 0}),
        "gray.jpg": (source.convert("L"), {}),
        "cmyk.jpg": (source.convert("CMYK"), {}),
        "rgb.jpg": (source, {"keep_rgb": True}),
        **{f"turned{turn}.jpg": (source, {"exif": exif(turn)}) for turn in range(1, 9)},
        "alpha.png": (alpha, {}),
        "gray_alpha.png": (alpha.convert("LA"), {}),
        "palette.png": (palette, {"transparency": 3}),
        "bilevel.png": (source.convert("1"), {}),
        "deep.png": (deep, {}),
        "turned.png": (source, {"exif": exif(6)}),
        "frames.gif": (source, {"save_all": True, "append_images": [alpha]}),
        "lossy.webp": (source, {}),
        "cmyk.tif": (source.convert("CMYK"), {}),
        "plain.bmp": (source, {}),
    }
    (tmp_path / "images").mkdir()
    for name, (image, options) in files.items():
        image.save(tmp_path / "images" / name, **options)
    names = list(files)
    dataset = ImageDataset(("x",), names, [tmp_path / "images" / name for name in names], AnyLabels(len(names)))
    config = AugmentConfig(crop_size=48, scale_range=(1, 1), flip_probability=0, blur_probability=0, strong=False)
    (ours,) = islice(DaliPipeline(dataset, config, len(names), 0, device=torch.device("cpu")), 1)
    (other,) = islice(TorchPipeline(dataset, config, len(names), 0), 1)
    assert ours.ids == other.ids
    assert set(ours.ids) == set(names)
    for id, a, b in zip(ours.ids, ours.weak, other.weak, strict=True):
        assert (a - b).abs().max() < 1e-5, id


class AnyLabels:
    """A label table in which every image has every class."""

    def __init__(self, length: int) -> None:
        self.present = np.ones((length, 1), bool)
        self.labelled = np.ones(length, bool)


def test_extreme_sizes_go_through(make_voc: Callable[..., Path]) -> None:
    images = {"dot": Image.new("RGB", (1, 1)), "line": Image.new("RGB", (8000, 1)), "grey": Image.new("L", (30, 8000))}
    dataset = open_dataset("voc", make_voc(images, {id: [] for id in images}), "train")
    for ours, other in zip(take(dataset, 4, batch_size=6), portable(dataset, 4, batch_size=6), strict=True):
        assert torch.equal(ours.valid, other.valid)
        assert steps(ours, other) < 0.6


def test_an_error_comes_at_its_place_in_the_stream(make_voc: Callable[..., Path]) -> None:
    """Everything before the bad image is handed out, however far DALI and its threads have read ahead."""
    images: dict[str, Image.Image | bytes] = {f"i{k}": Image.new("RGB", (20, 20), (k, 90, 9)) for k in range(12)}
    root = make_voc(images, {id: ["cat"] for id in images})
    dataset = open_dataset("voc", root, "train")
    order = [id for batch in portable(dataset, 12, batch_size=1) for id in batch.ids]
    whole = (root / "JPEGImages" / f"{order[7]}.jpg").read_bytes()
    (root / "JPEGImages" / f"{order[7]}.jpg").write_bytes(whole[: len(whole) // 2])
    stream = iter(DaliPipeline(dataset, CONFIG, 2, 7, device=torch.device("cpu"), prefetch=3, threads=2))
    assert [id for batch in islice(stream, 3) for id in batch.ids] == order[:6]
    with pytest.raises(UserError, match=f"{order[7]}.jpg: cannot be read"):
        next(stream)


@pytest.mark.parametrize("readable", [True, False])
def test_a_file_that_dali_cannot_decode_is_left_to_pil(
    make_voc: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, readable: bool
) -> None:
    """A decoder that fails in mid-stream, at a file that looked harmless: the stream goes on at that very batch. Here
    on the CPU, where the pipeline has no use for DALI's decoder, and image by image: it crashes where one of several
    cannot be decoded.
    """
    images: dict[str, Image.Image | bytes] = {f"i{k}": Image.new("RGB", (20, 20), (k, 90, 9)) for k in range(12)}
    root = make_voc(images, {id: ["cat"] for id in images})
    dataset = open_dataset("voc", root, "train")
    order = [id for batch in portable(dataset, 12, batch_size=1) for id in batch.ids]
    bad = root / "JPEGImages" / f"{order[7]}.jpg"
    if readable:
        Image.new("RGB", (20, 20), (9, 90, 9)).save(bad, "GIF")
    else:
        bad.write_bytes(bad.read_bytes()[:-30])
    monkeypatch.setattr(dali_feed, "plain_jpeg_size", lambda path, data: (20, 20))
    monkeypatch.setattr(dali_pipeline, "decoded_by_pil", lambda device: set())
    monkeypatch.setattr(dali_pipeline, "images_of", decode)
    monkeypatch.setattr(dali_pipeline, "RUN", 1)
    stream = iter(DaliPipeline(dataset, CONFIG, 1, 7, device=torch.device("cpu"), prefetch=3))
    ours = list(islice(stream, 7))
    if readable:
        ours += islice(stream, 9)
    else:
        with pytest.raises(UserError, match=bad.name):
            next(stream)
    for batch, other in zip(ours, portable(dataset, 16 if readable else 7, batch_size=1), strict=True):
        assert batch.ids == other.ids
        assert steps(batch, other) < 0.6


def test_closing_the_stream_ends_its_threads(dataset: ImageDataset) -> None:
    before = threading.active_count()
    stream = iter(DaliPipeline(dataset, CONFIG, 4, 0, device=torch.device("cpu"), threads=3))
    next(stream)
    assert threading.active_count() > before
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_keeping_nothing_ready_is_refused(dataset: ImageDataset) -> None:
    with pytest.raises(ValueError, match="prefetch is 0"):
        DaliPipeline(dataset, CONFIG, 2, 0, device=torch.device("cpu"), prefetch=0)
