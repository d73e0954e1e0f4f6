"""Many encoded images in one file, for disks where opening small files is the limit.

A pack is a plain tar: the image files' own bytes, entries named by image id (folders included) with the file's suffix.
Nothing else is in it, masks least of all. Where each image lies is read from the tar's headers once, at opening; after
that an image is one positioned read.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from cosa_fast.errors import UserError, first_line
from cosa_fast.files import written_aside

_REMEDY = "write it anew with: python -m cosa_fast.prepare ... --pack"


class Pack:
    """The images of a pack by id: an entry's name without suffix, or the end of it after a "/" where no other entry
    ends so. May be used by several threads at once, after a fork, and after pickling: then the file is opened anew at
    the first read.

    UserError naming the file: it cannot be read, is no uncompressed tar, is damaged or truncated, or holds an id twice
    or a link.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None
        try:
            self._version = _version(os.stat(self.path))
            self._entries = _index(self.path)
            self._ids = _by_every_end(self._entries)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error}); {_REMEDY}") from None
        except Exception as error:  # tarfile fails on damaged headers in many ways
            raise UserError(f"{self.path}: not a whole, uncompressed tar ({first_line(error)}); {_REMEDY}") from None

    def __contains__(self, id: str) -> bool:
        return id in self._ids

    @property
    def names(self) -> list[str]:
        """File names of the images, in the order of the pack."""
        return [name for name, _, _ in self._entries.values()]

    def image_path(self, id: str) -> Path:
        """PACK/NAME: no file, but what an error message calls the image."""
        return self.path / self._entry(id)[0]

    def read(self, id: str) -> bytes:
        """The image's encoded bytes. UserError if the pack was replaced or damaged since it was opened."""
        _, offset, size = self._entry(id)
        try:
            # pread has no position to share: threads and forked workers may use one descriptor.
            data = os.pread(self._opened().fileno(), size, offset)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error}); {_REMEDY}") from None
        if len(data) != size:
            raise UserError(f"{self.image_path(id)}: the pack has become shorter since it was opened; {_REMEDY}")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _entry(self, id: str) -> tuple[str, int, int]:
        return self._entries[self._ids[id]]

    def _opened(self) -> BinaryIO:
        if self._file is not None:
            return self._file
        file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - lives as long as the pack
        if _version(os.fstat(file.fileno())) != self._version:
            file.close()
            raise UserError(f"{self.path}: the pack was replaced while it was in use; start again")
        self._file = file
        return file


def write_pack(path: Path, images: Iterable[tuple[str, bytes]]) -> int:
    """Write (file name, encoded bytes) pairs as a pack, atomically; the same pairs always give the same bytes. Returns
    its size in bytes. UserError if it cannot be written.
    """
    with written_aside(path) as aside:
        with tarfile.open(aside, "w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
            for name, data in images:
                # A fresh TarInfo has no owner and the time 0.
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, BytesIO(data))
        return aside.stat().st_size


def require_unique(ids: Sequence[str], split: str) -> None:
    """UserError if the split names an id twice: a pack finds its images by id."""
    id, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise UserError(f"{split}: the list has the id {id} {count} times; take all but one off the list to pack it")


def require_packed(pack: Pack, ids: Sequence[str], command: str) -> None:
    """UserError if one of `ids` is not in the pack; `command` writes one that has them all."""
    missing = [id for id in ids if id not in pack]
    if missing:
        raise UserError(
            f"{pack.path}: {len(missing)} of {len(ids)} listed images are not in the pack, first {missing[0]}; "
            f"write it anew with: {command}"
        )


def packing_command(format: str, root: Path, split: str) -> str:
    """The command line that packs a split."""
    return f"python -m cosa_fast.prepare --format {format} --root {root} --split {split} --pack"


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _index(path: Path) -> dict[str, tuple[str, int, int]]:
    """Image id -> (file name, offset, size)."""
    entries: dict[str, tuple[str, int, int]] = {}
    end = 0
    with tarfile.open(path, "r:", encoding="utf-8") as tar:
        for member in tar:
            if member.size < 0 or member.offset_data < end:
                raise tarfile.ReadError("an entry lies before the one that it follows")  # read on, it would never end
            blocks = -(-member.size // tarfile.BLOCKSIZE)
            end = member.offset_data + blocks * tarfile.BLOCKSIZE
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise UserError(f"{path}: its entry {member.name} is no file; {_REMEDY}")
            id = PurePosixPath(member.name).with_suffix("").as_posix() if PurePosixPath(member.name).name else ""
            if id in entries:
                raise UserError(f"{path}: two entries have the id {id}; {_REMEDY}")
            entries[id] = (member.name, member.offset_data, member.size)
    # tarfile takes a damaged header, or the end of the file, for the end of the archive.
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(2 * tarfile.BLOCKSIZE) != tarfile.NUL * 2 * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("no end of archive where its entries end")
    return entries


def _by_every_end(ids: Iterable[str]) -> dict[str, str]:
    """Every id by itself, and by each end of it ("cat/x" by "x") that no other id has."""
    found: dict[str, str] = {}
    ends: Counter[str] = Counter()
    for id in ids:
        parts = id.split("/")
        for end in ("/".join(parts[start:]) for start in range(1, len(parts))):
            ends[end] += 1
            found[end] = id
    return {**{end: id for end, id in found.items() if ends[end] == 1}, **{id: id for id in ids}}
