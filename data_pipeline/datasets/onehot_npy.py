"""The field's cls_labels_onehot.npy: a dict, image id -> one-hot float vector, pickled inside an .npy file.

Unpickling can run any code, and this file is passed from hand to hand. So the header is read with numpy.lib.format, and
the pickle behind it by an unpickler that knows nothing but what numpy needs to rebuild plain arrays.
"""

import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format

from cosa_fast.errors import UserError, first_line

# numpy.core became numpy._core in numpy 2; files of both kinds are about.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


def read_onehot(path: Path, num_classes: int) -> dict[str, np.ndarray]:
    """Image id -> (num_classes,) bool. Never runs code from the file.

    UserError naming the file: unreadable, not such a dict, anything but plain arrays inside, or vectors of another
    length.
    """
    content = _read_object(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: wanted a dict of image id -> one-hot vector, got {type(content).__name__}; choose another file"
        )
    return {str(id): _row(path, id, vector, num_classes) for id, vector in content.items()}


class _ArrayUnpickler(pickle.Unpickler):
    """Knows plain numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no label file needs")
        return super().find_class(module, name)


def _read_object(path: Path) -> Any:
    try:
        with open(path, "rb") as stream:
            dtype = _read_header(stream)
            if dtype != np.dtype(object):
                raise UserError(
                    f"{path}: wanted a pickled dict, got an array of {dtype}; is this cls_labels_onehot.npy?"
                )
            array = _ArrayUnpickler(stream).load()
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; check the path") from None
    except Exception as error:  # a damaged or hostile pickle can fail in any way
        raise UserError(
            f"{path}: refused ({first_line(error)}); build the labels yourself with: python -m cosa_fast.prepare"
        ) from None
    return array.item() if isinstance(array, np.ndarray) and array.size == 1 else array


def _read_header(stream: IO[bytes]) -> np.dtype:
    version = npy_format.read_magic(stream)
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    return read(stream)[2]


def _row(path: Path, id: object, vector: Any, num_classes: int) -> np.ndarray:
    try:
        row = np.asarray(vector, dtype=np.float32)
    except (TypeError, ValueError):
        row = np.empty(0, dtype=np.float32)
    if row.shape != (num_classes,):
        raise UserError(
            f"{path}: the label of image {id} has shape {row.shape}, wanted ({num_classes},); check the list of classes"
        )
    return row > 0
