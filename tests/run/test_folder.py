"""One process writes in a run's folder."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosa_fast.errors import UserError
from cosa_fast.run.folder import RunFolder

REPOSITORY = Path(__file__).resolve().parents[2]
HOLDS = """
import sys
from pathlib import Path
from cosa_fast.run.folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "study" / "a")


@pytest.fixture
def other(folder: RunFolder) -> "Iterator[subprocess.Popen[str]]":
    """Another process that works in the folder."""
    command = [sys.executable, "-c", HOLDS, str(folder.path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_told_who_is_there(folder: RunFolder, other: "subprocess.Popen[str]") -> None:
    with pytest.raises(UserError, match=rf"in use by process {other.pid} on {socket.gethostname()}; end it first"):
        folder.locked().__enter__()
    assert folder.path.is_dir()


def test_the_lock_of_a_killed_process_is_taken_over(folder: RunFolder, other: "subprocess.Popen[str]") -> None:
    other.kill()
    other.wait()
    assert (folder.path / ".lock").exists()
    with folder.locked():
        assert json.loads((folder.path / ".lock").read_text()) == {"host": socket.gethostname(), "pid": os.getpid()}
    assert list(folder.path.iterdir()) == []


def test_another_host_s_lock_counts_for_as_long_as_its_file_is_there(folder: RunFolder) -> None:
    lock = folder.path / ".lock"
    lock.parent.mkdir(parents=True)
    lock.write_text('{"host": "node7", "pid": 12}')
    with pytest.raises(UserError, match=rf"process 12 on node7; .* if it no longer runs, delete {lock}"):
        folder.locked().__enter__()
    lock.unlink()
    with folder.locked():
        pass


def test_a_folder_in_which_nothing_was_written_is_taken_away_again(folder: RunFolder, tmp_path: Path) -> None:
    with folder.locked():
        assert folder.path.is_dir()
    assert list(tmp_path.iterdir()) == []
    with folder.locked():
        folder.log.touch()
    assert list(folder.path.iterdir()) == [folder.log]


@pytest.mark.parametrize("obstacle", ["runs", "runs/study/a", "runs/study/a/.lock/x"])
def test_a_place_that_cannot_be_a_run_s_folder_is_named(obstacle: str, folder: RunFolder, tmp_path: Path) -> None:
    place = tmp_path / obstacle
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("a file")
    with pytest.raises(UserError, match=rf"^run folder {folder.path}: cannot be written \(.*\); set run\.output or "):
        folder.locked().__enter__()
    assert place.read_text() == "a file"
