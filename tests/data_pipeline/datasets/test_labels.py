"""Label files: three forms, one meaning; nothing in them is ever executed."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from numpy.lib import format as npy_format

from cosa_fast.data_pipeline.datasets.labels import (
    class_names,
    encode_labels,
    read_labels,
    require_labels,
    write_labels,
)
from cosa_fast.data_pipeline.datasets.onehot_npy import read_onehot
from cosa_fast.errors import UserError

CLASSES = ("cat", "dog", "traffic light")
LABELS = {"a": ("cat", "traffic light"), "b": (), "c.1": ("dog",)}


def write_npy(path: Path, pickled: bytes) -> Path:
    with open(path, "wb") as stream:
        npy_format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": ()})
        stream.write(pickled)
    return path


def test_json_csv_and_npy_say_the_same(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels.json", LABELS)
    (tmp_path / "labels.csv").write_text("id,classes\na,cat,traffic light\nb,none\nc.1.jpg,dog\n")
    (tmp_path / "semicolons.csv").write_text("a.png,cat;traffic light\r\nb,none\r\nc.1, dog\r\n")
    onehot = {id: np.array([name in names for name in CLASSES], np.float32) for id, names in LABELS.items()}
    np.save(tmp_path / "labels.npy", onehot, allow_pickle=True)
    for name in ("labels.json", "labels.csv", "semicolons.csv", "labels.npy"):
        assert read_labels(tmp_path / name, CLASSES) == LABELS


def test_table_tells_an_empty_label_from_none(tmp_path: Path) -> None:
    table = encode_labels(LABELS, ["c.1", "b", "unknown"], CLASSES, "source")
    assert table.present.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert table.labelled.tolist() == [True, True, False]
    with pytest.raises(UserError, match=r"labels\.json: no label for 1 of 3 images, first unknown"):
        require_labels(table, ["c.1", "b", "unknown"], "labels.json")


def test_unknown_class_names_the_nearest_known_one() -> None:
    with pytest.raises(
        UserError, match=r"f\.json: image a has the unknown class 'Trafic light' \(did you mean 'traffic"
    ):
        encode_labels({"a": ("Trafic light",)}, ["a"], CLASSES, "f.json")


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("f.csv", "image,class\na,dog\na,ca\nb,dgo\n", "line 4: image b"),
        ("f.json", '{"a": ["dog"], "b": ["dog", "dgo"]}', "the entry of image b: image b"),
    ],
)
def test_an_unknown_class_is_told_with_its_line_and_the_list_of_classes(
    name: str, content: str, place: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    labels = read_labels(tmp_path / name, CLASSES)
    remedy = r"\(did you mean 'dog'\?\); correct it, or add it to classes\.txt"
    with pytest.raises(UserError, match=rf"f\.\w+, {place} has the unknown class 'dgo' {remedy}"):
        encode_labels(labels, ["b"], CLASSES, str(tmp_path / name))
    with pytest.raises(UserError, match="'unicorn', none of cat, dog"):
        encode_labels({"a": ("unicorn",)}, ["a"], CLASSES, "f.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.json", b'{"a": ['),
        ("list.json", b'["a"]'),
        ("number.json", b'{"a": 3}'),
        ("latin.json", b"\xe9\xff"),
        ("table.txt", b"a cat"),
        ("text.npy", b"not numpy"),
        ("short.npy", b""),
    ],
)
def test_files_of_another_form_are_refused_in_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        read_labels(tmp_path / name, CLASSES)
    assert "\n" not in str(caught.value)


class Hostile:
    """Unpickled without care, this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_not_run(protocol: int, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    for content in (Hostile(proof), {"a": Hostile(proof)}):
        path = write_npy(tmp_path / "bad.npy", pickle.dumps(content, protocol=protocol))
        with pytest.raises(UserError, match=r"bad\.npy: refused \(it asks for"):
            read_onehot(path, 3)
        assert not proof.exists()
    np.load(path, allow_pickle=True)
    assert proof.exists(), "the payload would work: the test above means something"


@pytest.mark.parametrize("name", ["eval", "getattr", "__import__"])
def test_builtins_are_out_of_reach(name: str, tmp_path: Path) -> None:
    path = write_npy(tmp_path / "bad.npy", f"cbuiltins\n{name}\n.".encode())
    with pytest.raises(UserError, match=f"builtins.{name}"):
        read_onehot(path, 3)


def test_both_spellings_of_numpy_core_are_read(tmp_path: Path) -> None:
    content = pickle.dumps({"a": np.array([0, 1, 1], np.float32)}, protocol=3)
    for spelling in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        other = content.replace(b"numpy._core.multiarray", spelling)
        assert read_onehot(write_npy(tmp_path / "x.npy", other), 3)["a"].tolist() == [False, True, True]


def test_wrong_vector_length_and_wrong_content_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", {"img": np.zeros(20)}, allow_pickle=True)
    with pytest.raises(UserError, match=r"image img has shape \(20,\), wanted \(3,\)"):
        read_onehot(tmp_path / "x.npy", 3)
    np.save(tmp_path / "x.npy", np.zeros((4, 3)))
    with pytest.raises(UserError, match="wanted a pickled dict"):
        read_onehot(tmp_path / "x.npy", 3)
    with pytest.raises(UserError, match="No such file"):
        read_onehot(tmp_path / "absent.npy", 3)


def test_real_onehot_file_is_read(voc_animals: Path) -> None:
    labels = read_onehot(voc_animals / "ImageSets/Segmentation/cls_labels_onehot.npy", 20)
    assert len(labels) >= 2222
    assert all(row.any() for row in labels.values())


def test_class_names_come_from_argument_then_file_then_format(tmp_path: Path) -> None:
    assert class_names(tmp_path, None, ("x",)) == ("x",)
    (tmp_path / "classes.txt").write_text("a\n\nb\n")
    assert class_names(tmp_path, None, ("x",)) == ("a", "b")
    assert class_names(tmp_path, ["c"], ("x",)) == ("c",)
    with pytest.raises(UserError, match="twice"):
        class_names(tmp_path, ["c", "c"], ())


def test_labels_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_labels(tmp_path / "sub" / "labels.json", LABELS)
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["labels.json"]
    with pytest.raises(UserError, match="json"):
        write_labels(tmp_path / "labels.txt", LABELS)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_labels(tmp_path / "file" / "labels.json", LABELS)
