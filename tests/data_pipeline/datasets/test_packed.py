"""Packed images: the same bytes and batches as loose files, from any process or thread, and nothing else accepted."""

import multiprocessing
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from cosa_fast.config.parsing import load_config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.packed import Pack, write_pack
from cosa_fast.data_pipeline.datasets.preparation import pack as pack_split
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline
from cosa_fast.data_pipeline.views.parameters import AugmentConfig
from cosa_fast.errors import UserError
from cosa_fast.run.data import open_datasets

IMAGES = [("b.jpg", b"one"), ("a.b.png", b"two" * 400), ("ü" * 90 + ".jpg", b""), ("c.jpg", b"4" * 1024)]


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    path = tmp_path / "some.tar"
    write_pack(path, IMAGES)
    return path


@pytest.fixture
def packed_root(synthetic_root: Path, tmp_path: Path) -> Path:
    """A copy of the synthetic set beside ROOT/train.tar."""
    root = tmp_path / "set"
    shutil.copytree(synthetic_root, root)
    pack_split(open_dataset("voc", root, "train"), "train", root / "train.tar")
    return root


def refusal(function: Callable[..., object], *arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def take(dataset: ImageDataset, workers: int) -> list[Batch]:
    return list(islice(TorchPipeline(dataset, AugmentConfig(crop_size=48), 5, 7, workers=workers), 4))


def read_all(pack: Pack) -> list[bytes]:
    return [pack.read(Path(name).stem) for name, _ in IMAGES]


def test_a_pack_is_a_plain_tar_of_the_files_in_their_order(pack: Path) -> None:
    with tarfile.open(pack) as tar:
        members = tar.getmembers()
        assert [(m.name, tar.extractfile(m).read()) for m in members] == IMAGES  # type: ignore[union-attr]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert Pack(pack).names == [name for name, _ in IMAGES]
    assert read_all(Pack(pack)) == [data for _, data in IMAGES]


def test_packing_twice_gives_the_same_bytes(packed_root: Path) -> None:
    first = (packed_root / "train.tar").read_bytes()
    for path in (packed_root / "JPEGImages").iterdir():
        os.utime(path, (1, 1))
    pack_split(open_dataset("voc", packed_root, "train"), "train", packed_root / "again.tar")
    assert (packed_root / "again.tar").read_bytes() == first


def test_a_pack_that_fails_half_way_leaves_the_old_one(pack: Path) -> None:
    before = pack.read_bytes()

    def images() -> object:
        yield IMAGES[0]
        raise UserError("unreadable")

    assert refusal(write_pack, pack, images()) == "unreadable"
    assert pack.read_bytes() == before
    assert [path.name for path in pack.parent.iterdir()] == [pack.name]


def test_batches_are_those_of_loose_files(
    packed_root: Path, open_stream: Callable[..., Iterable[Batch]], equal: Callable[[Batch, Batch], bool]
) -> None:
    loose, packed = (
        list(islice(open_stream(open_dataset("voc", packed_root, "train", pack=pack), threads=2), 4))
        for pack in (None, packed_root / "train.tar")
    )
    assert all(equal(a, b) for a, b in zip(loose, packed, strict=True))


def test_real_images_are_read_unchanged(voc_animals: Path, tmp_path: Path) -> None:
    dataset = open_dataset("voc", voc_animals, "val")
    pack_split(dataset, "val", tmp_path / "val.tar")
    packed = open_dataset("voc", voc_animals, "val", pack=tmp_path / "val.tar")
    assert packed.fingerprint() == dataset.fingerprint()
    for index in range(len(dataset)):
        assert packed.encoded(index) == dataset.image_path(index).read_bytes()


def test_other_processes_read_too(pack: Path) -> None:
    opened = Pack(pack)
    assert read_all(opened)[0] == b"one"  # the descriptor is open before the process starts
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(read_all, (opened,)) == [data for _, data in IMAGES]
    sent = pickle.loads(pickle.dumps(opened))  # as to a process that inherits nothing
    assert sent._file is None
    assert read_all(sent) == [data for _, data in IMAGES]


def test_threads_share_a_pack(tmp_path: Path) -> None:
    images = [(f"{k}.jpg", bytes([k]) * (5000 + k)) for k in range(200)]
    write_pack(tmp_path / "many.tar", images)
    opened = Pack(tmp_path / "many.tar")
    with ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            assert list(threads.map(opened.read, map(str, range(200)))) == [data for _, data in images]


def test_image_files_need_not_be_there(packed_root: Path) -> None:
    expected = take(open_dataset("voc", packed_root, "train"), 0)
    for path in (packed_root / "JPEGImages").glob("train_*"):
        path.unlink()
    options = ["data.format=voc", f"data.root={packed_root}", "data.train_split=train", "eval.coexistence=[]"]
    assert "listed images are missing" in refusal(open_datasets, load_config("voc.yaml", options))
    config = load_config("voc.yaml", [*options, f"data.pack={packed_root / 'train.tar'}"])
    training_set, validation_set = open_datasets(config)
    assert all(torch.equal(a.strong, b.strong) for a, b in zip(expected, take(training_set, 0), strict=True))
    assert training_set.mask(3).shape == (64, 64)
    assert validation_set.image_path(0).is_file(), "evaluation reads image files"
    shutil.rmtree(packed_root / "JPEGImages")
    assert len(open_dataset("voc", packed_root, "train", pack=packed_root / "train.tar")) == 12


def test_coco_reads_from_a_pack_alone(tiny_coco: Path, tmp_path: Path) -> None:
    dataset = open_dataset("coco", tiny_coco, "train2017")
    pack_split(dataset, "train2017", tmp_path / "train.tar")
    shutil.copytree(tiny_coco / "annotations", tmp_path / "annotations")
    packed = open_dataset("coco", tmp_path, "train2017", pack=tmp_path / "train.tar")
    assert packed.fingerprint() == dataset.fingerprint()
    assert packed.image(7).tobytes() == dataset.image(7).tobytes()


def test_a_folder_of_any_suffix_reads_from_a_pack_alone(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, name in enumerate(("x.png", "y.jpg", "z.bmp")):
        Image.new("RGB", (5, 4), (number, 0, 0)).save(tmp_path / "images" / name)
    (tmp_path / "labels.json").write_text('{"x": ["cat"], "y": [], "z": []}')
    (tmp_path / "train.txt").write_text("z.bmp\nx\n")
    pack_split(open_dataset("folder", tmp_path, "train"), "train", tmp_path / "train.tar")
    shutil.rmtree(tmp_path / "images")
    packed = open_dataset("folder", tmp_path, "train", pack=tmp_path / "train.tar")
    assert packed.ids == ("z", "x")
    assert packed.image(0).getpixel((0, 0)) == (2, 0, 0)
    (tmp_path / "train.txt").write_text("z.bmp\nx\ny.jpg\n")
    message = refusal(open_dataset, "folder", tmp_path, "train", pack=tmp_path / "train.tar")
    assert "1 of 3 listed images are missing" in message
    assert message.endswith(f"python -m cosa_fast.prepare --format folder --root {tmp_path} --split train --pack")


def test_class_folders_are_packed_with_their_folders(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for value, name in enumerate(["cat/x.jpg", "dog/x.png", "dog/y.JPG"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (10 * value, 0, 0)).save(root / name)
    loose = open_dataset("folder", root, "train")
    pack_split(loose, "train", tmp_path / "train.tar")
    shutil.rmtree(root)
    root.mkdir()
    packed = open_dataset("folder", root, "train", pack=tmp_path / "train.tar")
    assert (packed.ids, packed.classes) == (("cat/x", "dog/x", "dog/y"), ("cat", "dog"))
    assert packed.fingerprint() == loose.fingerprint()
    assert [packed.image(k).getpixel((0, 0))[0] for k in range(3)] == pytest.approx([0, 10, 20], abs=2)
    assert [packed.labels(k).tolist() for k in range(3)] == [[1, 0], [0, 1], [0, 1]]


def test_an_entry_is_found_by_its_end_where_only_one_has_it(tmp_path: Path) -> None:
    write_pack(tmp_path / "x.tar", [("a/one.jpg", b"1"), ("a/two.jpg", b"2"), ("b/two.jpg", b"3")])
    pack = Pack(tmp_path / "x.tar")
    assert (pack.read("one"), pack.read("a/two"), pack.read("b/two")) == (b"1", b"2", b"3")
    assert "two" not in pack


def test_a_pack_of_another_split_is_refused_with_the_command(packed_root: Path) -> None:
    message = refusal(open_dataset, "voc", packed_root, "val", pack=packed_root / "train.tar")
    assert f"{packed_root / 'train.tar'}: 4 of 4 listed images are not in the pack, first val_00000" in message
    assert message.endswith(f"python -m cosa_fast.prepare --format voc --root {packed_root} --split val --pack")


def test_a_damaged_image_in_a_pack_is_named(packed_root: Path) -> None:
    path = packed_root / "train.tar"
    with tarfile.open(path) as tar:
        member = tar.getmember("train_00002.jpg")
    with open(path, "r+b") as file:
        file.seek(member.offset_data)
        file.write(b"\0" * 64)
    dataset = open_dataset("voc", packed_root, "train", pack=path)
    assert "train.tar/train_00002.jpg: not an image" in refusal(dataset.image, 2)
    assert "train.tar/train_00002.jpg" in refusal(take, dataset, 2)


def test_every_truncation_is_seen_at_opening(pack: Path, tmp_path: Path) -> None:
    whole = pack.read_bytes()
    with tarfile.open(pack) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + last.size
    cuts = {0, 100, 511, 512, 600, 1000, 1024, last.offset, last.offset + 10, last.offset_data, end - 1, end, end + 512}
    for cut in cuts:
        damaged = tmp_path / "damaged.tar"
        damaged.write_bytes(whole[:cut])
        assert "damaged.tar: not a whole, uncompressed tar" in refusal(Pack, damaged), cut


def test_what_is_no_pack_is_refused(pack: Path, tmp_path: Path) -> None:
    content = bytearray(pack.read_bytes())
    content[1024 + 5] ^= 1  # in the header of the second image
    (tmp_path / "header.tar").write_bytes(content)
    assert "not a whole, uncompressed tar" in refusal(Pack, tmp_path / "header.tar")
    with tarfile.open(tmp_path / "some.tar.gz", "w:gz") as tar:
        tar.add(pack, "a.jpg")
    assert "not a whole, uncompressed tar" in refusal(Pack, tmp_path / "some.tar.gz")
    write_pack(tmp_path / "twice.tar", [IMAGES[0], ("b.png", b"other")])
    assert "two entries have the id b" in refusal(Pack, tmp_path / "twice.tar")
    assert "absent.tar: cannot be read (No such file" in refusal(Pack, tmp_path / "absent.tar")
    assert "cannot be read (Is a directory" in refusal(Pack, tmp_path)


def test_a_pack_that_leads_backwards_or_elsewhere_is_refused(tmp_path: Path) -> None:
    """Negative sizes would let tarfile read the same entries for ever."""
    for size in (-512, -1536, -(2**40)):
        entry = tarfile.TarInfo("b.jpg")
        entry.pax_headers = {"size": str(size)}
        with tarfile.open(tmp_path / "back.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(tarfile.TarInfo("a.jpg"))
            tar.addfile(entry)
        assert "not a whole, uncompressed tar" in refusal(Pack, tmp_path / "back.tar")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        entry = tarfile.TarInfo("b.jpg")
        entry.type, entry.linkname = kind, "/etc/passwd"
        with tarfile.open(tmp_path / "link.tar", "w") as tar:
            tar.addfile(entry)
        assert "entry b.jpg is no file" in refusal(Pack, tmp_path / "link.tar")


def test_a_tar_of_a_folder_is_a_pack(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"one")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "images", "images")
    pack = Pack(tmp_path / "x.tar")
    assert (pack.names, pack.read("a")) == (["images/a.jpg"], b"one")


def test_a_pack_that_changes_under_a_run_is_refused(pack: Path) -> None:
    opened, unused = Pack(pack), Pack(pack)
    assert opened.read("c") == b"4" * 1024
    write_pack(pack, [(name, data[::-1]) for name, data in IMAGES])
    assert opened.read("b") == b"one", "a rename leaves the file of those who have it open"
    assert "was replaced while it was in use" in refusal(unused.read, "b")
    shorter = Pack(pack)
    shorter.read("b")
    os.truncate(pack, 2000)
    assert "has become shorter" in refusal(shorter.read, "c")


def test_duplicate_ids_cannot_be_packed(packed_root: Path) -> None:
    listing = packed_root / "ImageSets/Segmentation/train.txt"
    listing.write_text("train_00001\ntrain_00002\ntrain_00001\n")
    message = refusal(pack_split, open_dataset("voc", packed_root, "train"), "train", packed_root / "x.tar")
    assert message.startswith("train: the list has the id train_00001 2 times")
    assert not (packed_root / "x.tar").exists()


def test_evaluation_does_not_read_the_pack(packed_root: Path) -> None:
    """Even where the same split is evaluated: data.pack is of the training split alone."""
    options = ["data.format=voc", f"data.root={packed_root}", "data.train_split=train", "data.val_split=train"]
    config = load_config("voc.yaml", [*options, "eval.coexistence=[]", f"data.pack={packed_root / 'train.tar'}"])
    assert open_datasets(config)[1].image_path(0).is_file()
    without = replace(config, data=replace(config.data, pack=None))
    assert open_datasets(without)[0].fingerprint() == open_datasets(config)[0].fingerprint()
