"""The one-hot file: nothing of its pickle is rebuilt, so nothing in it can run code or reach memory."""

import math
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.lib import format as npy_format

from cosa_fast.data_pipeline.datasets.onehot_npy import read_onehot
from cosa_fast.errors import UserError

VECTORS = {"a": np.array([0, 1, 1], np.float32), "b": np.array([1, 0, 0], np.float32)}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write_it(pickled: bytes) -> Path:
        path = tmp_path / "x.npy"
        with open(path, "wb") as stream:
            npy_format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": ()})
            stream.write(pickled)
        return path

    return write_it


def refusal(path: Path) -> str:
    with pytest.raises(UserError, match=r"x\.npy") as caught:
        read_onehot(path, 3)
    assert len(str(caught.value)) <= 500
    return str(caught.value)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.uint8, np.int64, bool, ">f4"])
def test_every_protocol_and_number_type_is_read(protocol: int, kind: type, write: Callable[[bytes], Path]) -> None:
    content = {id: vector.astype(kind) for id, vector in VECTORS.items()}
    for whole in (content, np.array(content, dtype=object)):
        read = read_onehot(write(pickle.dumps(whole, protocol=protocol)), 3)
        assert {id: row.tolist() for id, row in read.items()} == {"a": [False, True, True], "b": [True, False, False]}


def test_files_of_python_2_and_flat_lists_are_read(write: Callable[[bytes], Path]) -> None:
    one = np.array([0, 1, 1], np.float32).tobytes()
    python2 = (
        b"\x80\x02}U\x01a"
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x03\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U" + bytes([len(one)]) + one + b"tbs."
    )
    assert read_onehot(write(python2), 3)["a"].tolist() == [False, True, True]
    for content in ({"a": [0, 1, 1.5]}, {"a": [np.float32(0), np.float32(1), np.float32(1)]}, {"a": (0, 1, 10**400)}):
        assert read_onehot(write(pickle.dumps(content)), 3)["a"].tolist() == [False, True, True]


def dtype_state(*state: object) -> bytes:
    """A pickle whose array has a dtype with this state: numpy itself takes whatever stands there."""
    return (
        b"\x80\x03}X\x01\x00\x00\x00acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
        b"(K\x01K\x03\x85cnumpy\ndtype\nX\x02\x00\x00\x00f4K\x00K\x01\x87R"
        + pickle.dumps(state, protocol=3)[2:-1]
        + b"b\x89C\x0c"
        + bytes(12)
        + b"tbs."
    )


def array_state(*state: object) -> bytes:
    prefix = b"\x80\x03}X\x01\x00\x00\x00acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    return prefix + pickle.dumps(state, protocol=3)[2:-1] + b"bs."


def test_a_state_that_makes_numpy_follow_a_pointer_is_refused(write: Callable[[bytes], Path]) -> None:
    """A dtype told that its elements are objects makes numpy take the file's bytes for addresses."""
    plain = (3, "<", None, None, None, -1, -1, 0)
    assert read_onehot(write(dtype_state(*plain)), 3)["a"].tolist() == [False] * 3, "the frame of these files is right"
    subarray, fields = (np.dtype("O"), (3,)), {"x": (np.dtype("O"), 0)}
    for state in (
        (3, "<", subarray, None, None, -1, -1, 0),
        (3, "<", None, ("x",), fields, 8, 1, 27),
        (3, "<", None, ("x",), {"x": (5, 2**40)}, 2**40, 1, 0),
        (3, "!", None, None, None, -1, -1, 0),
    ):
        assert "refused" in refusal(write(dtype_state(*state)))
    # This one crashed an unpickler that knew nothing but numpy's arrays, at an address of the file's choice.
    state = pickle.dumps((3, "|", None, ("x",), {"x": (np.dtype("O"), 0)}, 8, 1, 0), protocol=3)[2:-1]
    address = dtype_state().replace(b"f4", b"V8").replace(pickle.dumps((), protocol=3)[2:-1] + b"b", state + b"b")
    assert "refused" in refusal(write(address.replace(b"C\x0c" + bytes(12), b"C\x18" + b"A" * 24)))
    # Flags and sizes after the byte order are not looked at: the number type stays the one of its name.
    assert read_onehot(write(dtype_state(3, "<", None, None, None, 2**40, 2**40, 63)), 3)["a"].tolist() == [False] * 3


def test_an_array_is_as_large_as_its_bytes(write: Callable[[bytes], Path]) -> None:
    four, objects = np.dtype("f4"), np.dtype("O")
    for state in (
        (1, (2**60,), four, False, bytes(12)),
        (1, (-3,), four, False, bytes(12)),
        (1, (3.0,), four, False, bytes(12)),
        (1, (3,), four, False, bytes(11)),
        (1, (3,), objects, False, bytes(24)),
        (1, (0, 2**62), np.dtype("U3"), False, b""),
        (1, (3,), np.dtype("M8[s]"), False, bytes(24)),
    ):
        assert "refused" in refusal(write(array_state(*state)))
    for shape in ((0, 2**40), (3, 1), ()):
        assert "x.npy" in refusal(write(array_state(1, shape, four, False, bytes(4 * math.prod(shape)))))


def test_opcodes_beyond_the_short_list_are_refused(write: Callable[[bytes], Path]) -> None:
    used = {opcode.name for opcode, _, _ in pickletools.genops(pickle.dumps(VECTORS, protocol=4))}
    assert "INST" not in used
    for pickled in (
        b"(S'x'\nios\nsystem\n.",
        b"(cos\nsystem\nS'x'\no.",
        b"\x80\x02cnumpy\nndarray\n)\x81.",
        b"Pabc\n.",
        b"\x80\x05\x97.",
        b"\x82\x01.",
    ):
        assert "refused" in refusal(write(pickled))
    for pickled in (
        b".",
        b"K\x01K\x02.",
        b"}}}s.",
        b"(",
        b"\x85.",
        b"}K\x01}K\x02}ss",
        b"h\x05.",
        b"R.",
        b"b.",
        b"}b.",
    ):
        refusal(write(pickled))


def test_what_cannot_be_printed_or_hashed_in_time_is_no_image_id(write: Callable[[bytes], Path]) -> None:
    doubled = b"K\x00" + b"q\x00h\x00\x86" * 60
    enormous = b"\x8b" + (5000).to_bytes(4, "little") + b"\x7f" * 5000
    for key in (doubled, enormous, b")"):
        assert "no image id" in refusal(write(b"\x80\x02}" + key + b"]s."))
    nested: list = []
    for _ in range(60):
        nested = [nested, nested]
    assert "shape (0,)" in refusal(write(pickle.dumps({"a": nested})))
    long_name = pickle.dumps({"a\x1b[2J\n" * 10000: [1]})
    assert "\n" not in refusal(write(long_name))
