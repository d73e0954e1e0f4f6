"""Label files (JSON, CSV, one-hot), lists and VOC annotations of any content."""

import io
import json
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.oracle import TEXTS, VALUES, damaged, fuzzed, held, put
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cosa_fast.data_pipeline.datasets.labels import encode_labels, read_labels
from cosa_fast.data_pipeline.datasets.onehot_npy import read_onehot
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.voc import read_annotations

CLASSES = ("cat", "dog", "bird")
VECTORS = {"a": np.array([0, 1, 1], np.float32), "b": np.array([1, 0, 0], np.float32)}


def read(path: Path) -> Any:
    return encode_labels(read_labels(path, CLASSES), ["a", "b"], CLASSES, str(path))


@fuzzed(80)
@given(st.data())
def test_json(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "labels.json"
    content: Any = {"a": ["cat"], "b": ["dog", "bird"], "c.jpg": []}
    put(content, data.draw, data.draw(VALUES))
    text = json.dumps(content).encode()
    path.write_bytes(data.draw(st.one_of(st.just(text), damaged(text), st.binary(max_size=50))))
    held(tmp_path, lambda: read(path), "labels.json")


@fuzzed(80)
@given(
    st.one_of(
        damaged(b'id,classes\na,cat;dog\n"b.jpg",bird\n'),
        st.lists(TEXTS).map(lambda t: ",".join(t).encode("utf-8", "surrogatepass")),
    )
)
def test_csv(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    held(tmp_path, lambda: read(path), "labels.csv")


def npy(pickled: bytes) -> bytes:
    stream = io.BytesIO()
    np.save(stream, {}, allow_pickle=True)
    head = stream.getvalue()
    return head[: head.index(b"\n") + 1] + pickled


@st.composite
def opcodes(draw: st.DrawFn) -> bytes:
    """Any opcodes in any order: a few bytes of argument behind each, of the right length or not."""
    names = [b"numpy\nndarray\n", b"numpy\ndtype\n", b"numpy.core.multiarray\n_reconstruct\n", b"os\nsystem\n"]
    content = b"\x80\x04"
    for _ in range(draw(st.integers(1, 25))):
        opcode = draw(st.sampled_from(pickletools.opcodes))
        argument = draw(st.sampled_from([b"", b"\x00", b"\x01a", b"\x01\x00\x00\x00a", b"1\n", *names]))
        content += opcode.code.encode("latin-1") + argument
    return content + b"."


WHOLE = [npy(pickle.dumps(np.array(VECTORS, dtype=object), protocol=protocol)) for protocol in (3, 4, 5)]


@fuzzed(250)
@given(st.one_of(st.sampled_from(WHOLE).flatmap(damaged), opcodes().map(npy), st.binary(max_size=100)))
def test_onehot_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels.npy"
    path.write_bytes(content)
    rows = held(tmp_path, lambda: read_onehot(path, 3), "labels.npy")
    for id, row in (rows or {}).items():
        assert isinstance(id, str)
        assert (row.shape, row.dtype) == ((3,), bool)


@fuzzed(60)
@given(
    st.sampled_from(["folder", "voc"]),
    st.one_of(
        st.binary(max_size=40),
        st.lists(TEXTS | st.sampled_from(["a", "b.png"])).map(lambda t: "\n".join(t).encode("utf-8", "surrogatepass")),
    ),
)
def test_lists(tmp_path: Path, format: str, content: bytes) -> None:
    images = tmp_path / ("images" if format == "folder" else "JPEGImages")
    listing = tmp_path / ("train.txt" if format == "folder" else "ImageSets/Segmentation/train.txt")
    for folder in (images, listing.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("a.jpg", "b.png"):
        if not (images / name).exists():
            Image.new("RGB", (4, 4)).save(images / name)
    listing.write_bytes(content)
    (tmp_path / "labels.json").write_text('{"a": ["cat"], "b": []}')
    dataset = held(tmp_path, lambda: open_dataset(format, tmp_path, "train"), str(tmp_path))
    if dataset is not None:
        held(tmp_path, lambda: [dataset.image(index) for index in range(len(dataset))], str(tmp_path))


BOMB = b"".join(b'<!ENTITY e%d "%s">' % (k, b"&e%d;" % (k - 1) * 10 if k else b"cat") for k in range(10))
XML = [
    b"<annotation><object><name>cat</name><difficult>1</difficult></object><object><name>dog</name></object></annotation>",
    b"<!DOCTYPE a [" + BOMB + b"]><annotation><object><name>&e9;</name></object></annotation>",
    b'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation><object><name>&e;</name></object></annotation>',
    b'<?xml version="1.0" encoding="utf-16"?><annotation/>',
    b"<object>" * 20000,
]


@fuzzed(80)
@given(st.sampled_from(XML).flatmap(lambda whole: st.just(whole) | damaged(whole)) | st.binary(max_size=60))
def test_annotations(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "Annotations").mkdir(exist_ok=True)
    (tmp_path / "Annotations" / "a.xml").write_bytes(content)

    def labels() -> Any:
        return encode_labels(read_annotations(tmp_path, ["a"]), ["a"], CLASSES, str(tmp_path / "Annotations"))

    table = held(tmp_path, labels, "Annotations")
    assert table is None or b"passwd" not in content or not table.present.any()
