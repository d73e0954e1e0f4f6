"""python -m cosa_fast.prepare: one label file from every source, every bad image in one report."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_fast.cli import run_cli
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.synthetic import generate
from cosa_fast.errors import UserError
from cosa_fast.prepare import main

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    generate(root, train=10, val=3, size=32)
    return root


def run(root: Path, *options: str, split: str = "train") -> int:
    return main(["--format", "voc", "--root", str(root), "--split", split, "--workers", "0", *options])


@pytest.fixture
def lines_of(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """lines_of(*options): what a command line that fails says on stderr."""

    def call(*options: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["prepare", "--format", "voc", "--root", str(root), *options])
        assert run_cli(main) == 2
        return capsys.readouterr().err.strip().splitlines()

    return call


def test_every_source_gives_the_same_labels(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = {id: names for id, names in json.loads((root / "labels.json").read_text()).items() if "train" in id}
    classes = (root / "classes.txt").read_text().split()
    onehot = {id: np.array([name in names for name in classes], np.float32) for id, names in truth.items()}
    np.save(root / "cls_labels_onehot.npy", onehot, allow_pickle=True)
    (root / "Annotations").mkdir()
    for id, names in truth.items():
        objects = "".join(f"<object><name>{name}</name></object>" for name in names)
        (root / "Annotations" / f"{id}.xml").write_text(f"<annotation>{objects}</annotation>")
    (root / "labels.json").unlink()
    for source in ("masks", "xml", "npy"):
        output = tmp_path / f"{source}.json"
        assert run(root, "--from", source, "-o", str(output)) == 0
        assert json.loads(output.read_text()) == truth
    printed = capsys.readouterr().out
    assert "10 images" in printed
    assert all(name in printed for name in classes)


def test_splits_are_gathered_in_one_file(root: Path) -> None:
    whole = json.loads((root / "labels.json").read_text())
    (root / "labels.json").unlink()
    assert run(root) == 0
    assert len(json.loads((root / "labels.json").read_text())) == 10
    assert run(root, split="val") == 0
    assert json.loads((root / "labels.json").read_text()) == whole


def test_a_split_that_shares_images_with_another_is_added(root: Path) -> None:
    whole = json.loads((root / "labels.json").read_text())
    (root / "labels.json").unlink()
    listing = root / "ImageSets/Segmentation"
    (listing / "some.txt").write_text("train_00001\n")
    assert run(root, split="some") == 0
    assert run(root) == 0
    assert json.loads((root / "labels.json").read_text()) == {id: whole[id] for id in whole if "train" in id}


def test_all_bad_images_are_reported_at_once(root: Path, lines_of: Callable[..., list[str]]) -> None:
    before = (root / "labels.json").read_text()
    for index in (2, 5, 7):
        path = root / "JPEGImages" / f"train_0000{index}.jpg"
        path.write_bytes(path.read_bytes()[:-150])
    lines = lines_of("--split", "train", "--workers", "2")
    assert [line.startswith("bad: ") for line in lines] == [True, True, True, False]
    for index, line in zip((2, 5, 7), lines, strict=False):
        assert f"train_0000{index}.jpg" in line
    assert lines[-1].startswith("error: 3 of 10 images are bad")
    assert (root / "labels.json").read_text() == before


def test_bad_masks_are_bad_only_where_masks_are_the_source(root: Path, tmp_path: Path) -> None:
    (root / "SegmentationClass/train_00004.png").write_bytes(b"nothing")
    np.save(root / "cls_labels_onehot.npy", {f"train_{k:05d}": np.ones(5) for k in range(10)}, allow_pickle=True)
    with pytest.raises(UserError, match=r"train_00004\.png: not an image"):
        run(root, "--from", "masks", "-o", str(tmp_path / "x.json"))
    assert run(root, "-o", str(tmp_path / "x.json")) == 0


def test_masks_that_cannot_be_used_are_one_line(root: Path, lines_of: Callable[..., list[str]]) -> None:
    """As training says it; the images are blameless."""
    for path in (root / "SegmentationClass").glob("*.png"):
        with Image.open(path) as mask:
            mask.convert("L").save(path.with_suffix(".jpg"))
        path.unlink()
    (line,) = lines_of("--split", "train", "--workers", "0")
    assert "train_00000.jpg: JPEG changes the values of a mask; save masks as PNG (10 of 10 masks" in line


def test_a_root_that_is_not_there_is_the_option_s(root: Path) -> None:
    for format in ("voc", "coco", "folder"):
        with pytest.raises(UserError, match=r"^--root .*/ste: no such folder \(did you mean '.*/set'\?\); give"):
            main(["--format", format, "--root", str(root.with_name("ste")), "--split", "train"])


def test_a_given_file_is_converted(root: Path, tmp_path: Path) -> None:
    rows = [f"train_{k:05d},dots;rings" for k in range(10)]
    (tmp_path / "given.csv").write_text("\n".join(rows))
    assert run(root, "--labels", str(tmp_path / "given.csv"), "-o", str(tmp_path / "x.json")) == 0
    assert json.loads((tmp_path / "x.json").read_text())["train_00003"] == ["dots", "rings"]
    (tmp_path / "given.csv").write_text("\n".join(rows[1:]))
    with pytest.raises(UserError, match="no label for 1 of 10 images, first train_00000"):
        run(root, "--labels", str(tmp_path / "given.csv"), "-o", str(tmp_path / "x.json"))


def test_nothing_to_take_labels_from_is_said(root: Path) -> None:
    shutil.rmtree(root / "SegmentationClass")
    (root / "labels.json").unlink()
    with pytest.raises(UserError, match="give --labels FILE"):
        run(root)
    with pytest.raises(UserError, match="cls_labels_onehot"):
        run(root, "--from", "npy")
    with pytest.raises(UserError, match=r"no masks; add them .*10 of 10 masks cannot be used"):
        run(root, "--from", "masks")


def test_real_coco_instances_become_a_label_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = Path(os.environ.get("COSA_SHARED", REPOSITORY.parent / "shared")) / "data/tiny_coco"
    if not coco.is_dir():
        pytest.skip(f"real data not found: {coco} (set COSA_SHARED)")
    output = tmp_path / "labels.json"
    arguments = ["--format", "coco", "--root", str(coco), "--split", "val2017", "--workers", "0", "-o", str(output)]
    assert main(arguments) == 0
    labels = json.loads(output.read_text())
    assert labels
    assert all(labels.values())
    assert f"data.labels={output}" in capsys.readouterr().out, "a label file is not looked for"


def test_a_pack_is_written_beside_the_label_file(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, "--pack") == 0
    assert f"{root / 'train.tar'}: 10 images of train, 0.0 MiB; train with data.pack=" in capsys.readouterr().out
    with tarfile.open(root / "train.tar") as tar:
        assert tar.getnames() == [f"train_{k:05d}.jpg" for k in range(10)]
    assert run(root, "--pack", str(tmp_path / "elsewhere/mine.tar")) == 0
    assert (tmp_path / "elsewhere/mine.tar").read_bytes() == (root / "train.tar").read_bytes()


def test_without_being_asked_nothing_is_packed(root: Path) -> None:
    assert run(root) == 0
    assert not list(root.rglob("*.tar"))


def test_bad_images_are_not_packed(root: Path) -> None:
    (root / "JPEGImages/train_00003.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match="1 of 10 images are bad"):
        run(root, "--pack")
    assert not list(root.rglob("*.tar*"))


def test_errors_of_packing_are_one_line(root: Path, lines_of: Callable[..., list[str]]) -> None:
    def error(*options: str) -> str:
        (line,) = lines_of("--workers", "0", *options)
        return line

    assert "choose a name that ends in .tar" in error("--split", "train", "--pack", str(root / "photo.jpg"))
    (root / "taken.tar").mkdir()
    assert "taken.tar: cannot be written" in error("--split", "train", "--pack", str(root / "taken.tar"))
    (root / "ImageSets/Segmentation/twice.txt").write_text("train_00001\ntrain_00001\n")
    assert "twice: the list has the id train_00001 2 times" in error("--split", "twice", "--pack")


def test_fewer_than_no_workers_are_refused(lines_of: Callable[..., list[str]]) -> None:
    assert lines_of("--split", "train", "--workers", "-1") == [
        "error: --workers: '-1' is no whole number from 0 up; all options: python -m cosa_fast.prepare --help"
    ]


def test_the_module_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "cosa_fast.prepare", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.startswith("usage: python -m cosa_fast.prepare")) == (0, True)


def test_the_users_labels_are_checked_and_never_replaced(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = json.loads((root / "labels.json").read_text())
    labels["train_00003"] = ["dots"] if labels["train_00003"] != ["dots"] else ["rings"]
    text = json.dumps(labels)
    (root / "labels.json").write_text(text)
    assert run(root) == 0
    out = capsys.readouterr().out
    assert "labels and masks differ on 1 of 10 images that have both:" in out
    assert "train_00003: the label says" in out
    assert (root / "labels.json").read_text() == text
    with pytest.raises(UserError, match="holds other labels of 1 image, first train_00003"):
        run(root, "--from", "masks")
    assert (root / "labels.json").read_text() == text


def test_a_folder_for_each_class_is_labels_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat/x.jpg", "dog/y.jpg"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (20, 10)).save(tmp_path / name)
    assert main(["--format", "folder", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 images, 2 labels, 0 images with none of the classes" in said
    assert f"labels from {tmp_path}; left as they are, nothing written" in said
    assert (tmp_path / "classes.txt").read_text(encoding="utf-8") == "cat\ndog\n"
    assert not (tmp_path / "labels.json").exists()


@pytest.fixture
def officially_labelled(root: Path) -> Path:
    """Labels in a one-hot file, and others in Annotations, which count less; a list of three images."""
    (root / "labels.json").unlink()
    (root / "Annotations").mkdir()
    ids = [path.stem for path in (root / "JPEGImages").iterdir()]
    np.save(root / "cls_labels_onehot.npy", {id: np.eye(5)[len(id) % 5] for id in ids}, allow_pickle=True)
    for id in ids:
        (root / f"Annotations/{id}.xml").write_text("<annotation><object><name>dots</name></object></annotation>")
    (root / "ImageSets/Segmentation/three.txt").write_text("train_00001\ntrain_00004\ntrain_00007\n")
    return root


def test_official_labels_are_gathered_split_by_split(
    officially_labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = officially_labelled
    onehot, written = f"{root}/cls_labels_onehot.npy", f"written to {root}/labels.json"
    expected = {
        "three": f"labels from {onehot}; {written}: 3 images of three\n",
        "train": f"labels from {root}/labels.json (3) and cls_labels_onehot.npy (7); {written}: 7 images of train, "
        "3 other images kept in it\n",
    }
    for split, words in expected.items():
        assert run(root, split=split) == 0
        assert words in capsys.readouterr().out
    text = (root / "labels.json").read_text()
    assert run(root) == 0
    assert f"labels from {root}/labels.json; left as they are, nothing written" in capsys.readouterr().out
    assert (root / "labels.json").read_text() == text


@pytest.mark.parametrize("order", [("three", "train", "val"), ("val", "three", "train")])
@pytest.mark.parametrize("options", [(), ("--from", "npy")])
def test_no_order_of_splits_hides_labels(
    officially_labelled: Path, order: tuple[str, ...], options: tuple[str, ...]
) -> None:
    """Those written for one split count for its images alone."""
    root = officially_labelled
    fingerprints = {split: open_dataset("voc", root, split).fingerprint() for split in order}
    for split in order:
        assert run(root, *options, split=split) == 0
        assert {split: open_dataset("voc", root, split).fingerprint() for split in order} == fingerprints


def test_labels_from_several_sources_are_said(officially_labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = officially_labelled
    (root / "labels.json").write_text('{"train_00001": ["rings"], "JPEGImages/train_00004.jpg": ["rings"]}')
    assert run(root) == 0
    assert f"labels from {root}/labels.json (2) and cls_labels_onehot.npy (8); written to" in capsys.readouterr().out
    text = (root / "labels.json").read_text()
    with pytest.raises(UserError, match="holds other labels of 2 images, first train_00001"):
        run(root, "--from", "npy", split="three")
    assert (root / "labels.json").read_text() == text


def write_folder(root: Path, masks: str) -> Path:
    """Images a to d, and masks of those named; two classes."""
    (root / "masks").mkdir(parents=True)
    (root / "classes.txt").write_text("1\n2\n")
    (root / "two.txt").write_text("a\nb\n")
    (root / "train.txt").write_text("a\nb\nc\nd\n")
    for number, id in enumerate("abcd"):
        Image.new("RGB", (6, 4)).save(root / f"{id}.jpg")
        if id in masks:
            Image.fromarray(np.full((4, 6), number % 2 + 1, np.uint8)).save(root / f"masks/{id}.png")
    return root


def test_splits_of_a_folder_are_gathered_from_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where classes are named by numbers."""
    command = ["folder", "--root", str(write_folder(tmp_path, "abcd")), "--workers", "0", "--split"]
    assert main([*command, "two"]) == 0
    assert f"labels from masks; written to {tmp_path}/labels.json: 2 images of two\n" in capsys.readouterr().out
    assert main([*command, "train"]) == 0
    words = (
        f"labels from {tmp_path}/labels.json (2) and masks (2); written to {tmp_path}/labels.json: 2 images of train"
    )
    assert f"{words}, 2 other images kept in it\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "labels.json").read_text()) == {"a": ["1"], "b": ["2"], "c": ["1"], "d": ["2"]}


def test_images_without_label_and_mask_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    root = write_folder(tmp_path, "abc")
    (root / "labels.csv").write_text("a,1\n")
    with pytest.raises(
        UserError, match=r"labels\.csv: no label for 1 of 4 images, first d, nor a mask to take it from"
    ):
        main(["folder", "--root", str(root), "--workers", "0"])
    assert not (root / "labels.json").exists()


@pytest.mark.parametrize("options", [("--from", "masks"), ("--labels", "given.csv")])
def test_labels_that_a_new_file_overrules_are_told(
    options: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path, "abcd")
    (root / "labels.csv").write_text("a,1\nb,1\nc,1\nd,1\n")
    monkeypatch.chdir(root)
    Path("given.csv").write_text("a,1\nb,2\nc,1\nd,2\n")
    assert main(["folder", "--root", str(root), "--workers", "0", *options]) == 0
    overruled = f"it counts before {root}/labels.csv, where there are other labels of 2 images, first b\n"
    assert overruled in capsys.readouterr().out


def test_labels_written_by_other_names_stay_one_entry(tmp_path: Path) -> None:
    root = write_folder(tmp_path, "abcd")
    (root / "labels.json").write_text('{"photos/A.JPG": ["1"], "elsewhere": ["2"]}')
    assert main(["folder", "--root", str(root), "--workers", "0"]) == 0
    assert list(json.loads((root / "labels.json").read_text())) == ["a", "elsewhere", "b", "c", "d"]


def test_the_splits_that_are_there_are_proposed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "coco/annotations").mkdir(parents=True)
    for split in ("val2017", "train2017"):
        (tmp_path / f"coco/annotations/instances_{split}.json").touch()
    for format, there in (("coco", "train2017, val2017"), ("voc", "train, val")):
        where = tmp_path / "coco" if format == "coco" else root
        with pytest.raises(UserError, match=rf"^--split: which list of the {format} set\? there are {there}$"):
            main([format, "--root", str(where)])


def test_no_training_on_the_validation_split_is_proposed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, split="val") == 0
    said = capsys.readouterr().out
    assert "cosa_fast.train" not in said
    assert f"prepare --format voc --root {root} --split train\n" in said
    assert run(root) == 0
    assert "data.val_split" not in capsys.readouterr().out
    (root / "ImageSets/Segmentation/train.txt").unlink()
    assert run(root, split="val") == 0
    assert "data.train_split=val data.val_split=null" in capsys.readouterr().out, "there is no other"


def test_the_command_for_a_machine_without_gpu_says_where_weights_are_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["folder", "--root", str(write_folder(tmp_path, "abcd")), "--workers", "0"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("without a GPU: ")]
    assert "model.weights=FILE" in line


def test_labels_from_an_npy_file_are_those_of_the_given_one(
    officially_labelled: Path, tmp_path: Path, lines_of: Callable[..., list[str]]
) -> None:
    given = tmp_path / "mine.npy"
    np.save(given, {id: np.eye(5)[2] for id in ("train_00001", "train_00004", "train_00007")}, allow_pickle=True)
    assert run(officially_labelled, "--from", "npy", "--labels", str(given), split="three") == 0
    name = (officially_labelled / "classes.txt").read_text().split()[2]
    assert set(map(tuple, json.loads((officially_labelled / "labels.json").read_text()).values())) == {(name,)}
    assert "which of them?" in lines_of("--split", "three", "--from", "npy", "--labels", "labels.csv")[0]


def test_records_are_not_rewritten(root: Path, lines_of: Callable[..., list[str]]) -> None:
    """Their further columns would be lost."""
    labels = json.loads((root / "labels.json").read_text())
    records = [{"image": id, "classes": names, "by": "me"} for id, names in labels.items() if id != "train_00001"]
    text = json.dumps(records)
    (root / "labels.json").write_text(text)
    (line,) = lines_of("--split", "train")
    assert "labels.json: holds records" in line
    assert "-o FILE" in line
    assert (root / "labels.json").read_text() == text


def test_a_folder_that_cannot_be_written_is_checked_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg")
    (tmp_path / "labels.csv").write_text("a,big dog\n")
    (tmp_path / "classes.txt").mkdir()  # no file can be put there
    assert main(["folder", "--root", str(tmp_path), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert f"warning: {tmp_path}/classes.txt: cannot be written" in out
    assert """data.classes='["big dog"]'""" in out
    assert "train with: " in out
