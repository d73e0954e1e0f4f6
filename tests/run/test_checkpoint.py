"""The files of checkpoints: whole or absent, rotated."""

import resource
from pathlib import Path

import pytest
import torch

from cosa_fast.errors import UserError
from cosa_fast.evaluation.networks import load
from cosa_fast.run import checkpoint
from cosa_fast.run.folder import RunFolder


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "00000001.pt"
    checkpoint.save(path, {"iteration": 1, "weights": torch.arange(3.0)})

    state = load(path)
    assert state["iteration"] == 1
    assert torch.equal(state["weights"], torch.arange(3.0))
    assert [file.name for file in path.parent.iterdir()] == ["00000001.pt"]


def test_a_full_disk_is_named_and_the_old_file_stays_whole(tmp_path: Path) -> None:
    """Bounded file sizes fail as a full disk does: in the middle of a write."""
    path = tmp_path / "best.pt"
    checkpoint.save(path, {"iteration": 1})
    content = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^checkpoint .*best\.pt: cannot be written \(.*--resume auto$") as caught:
            checkpoint.save(path, {"weights": torch.zeros(1 << 16), "iteration": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert "File too large" in str(caught.value)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_an_unfinished_file_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    """A process killed while saving leaves its scratch file behind."""
    folder = RunFolder(tmp_path)
    checkpoint.save(folder.checkpoint(1), {"iteration": 1})
    (folder.best.parent / ".00000002.pt.77.partial").write_bytes(b"half")

    assert checkpoint.latest(folder) == folder.checkpoint(1)


def test_rotation_keeps_the_last_and_the_named_ones(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert checkpoint.latest(folder) is None
    kept = [folder.checkpoint(20), folder.checkpoint(100), folder.best, folder.last_good]
    folder.best.parent.mkdir()
    for path in (*kept, folder.checkpoint(3), folder.checkpoint(9)):
        path.touch()
    checkpoint.rotate(folder, keep=2)

    assert {*folder.best.parent.iterdir()} == {*kept}
    assert checkpoint.latest(folder) == folder.checkpoint(100)
