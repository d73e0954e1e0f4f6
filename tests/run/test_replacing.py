"""An earlier run in the same folder is lost only when it was to be, and when the new one has a checkpoint."""

import os
from pathlib import Path

import pytest

from cosa_fast.errors import UserError
from cosa_fast.run import replacing
from cosa_fast.run.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """That of an earlier run, with something of the user's in it."""
    folder = RunFolder(tmp_path)
    write(folder, "old")
    (tmp_path / "notes.txt").write_text("mine")
    return folder


def write(folder: RunFolder, text: str) -> None:
    """What a run writes, more or less."""
    for path in (folder.config, folder.log, folder.results, folder.best, folder.tensorboard / "events", folder.trace):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def content(folder: RunFolder) -> dict[str, str]:
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder.path)): path.read_text() for path in files}


def test_it_goes_when_the_new_run_has_a_checkpoint(folder: RunFolder) -> None:
    with replacing.replacing(folder):
        assert not folder.kept()
        folder.log.write_text("new")
        folder.checkpoints.mkdir()
        folder.checkpoint(2).write_text("new")
        replacing.drop_replaced(folder)
    assert content(folder) == {"notes.txt": "mine", "log.jsonl": "new", "checkpoints/00000002.pt": "new"}


def test_it_comes_back_when_the_new_one_fails_before(folder: RunFolder) -> None:
    before = content(folder)
    with pytest.raises(UserError), replacing.replacing(folder):  # noqa: PT012
        folder.log.write_text("new")
        folder.manifest.write_text("new")
        raise UserError("disk full")
    assert content(folder) == before


def test_it_stays_gone_when_the_new_one_fails_after(folder: RunFolder) -> None:
    with pytest.raises(UserError), replacing.replacing(folder):  # noqa: PT012
        folder.checkpoints.mkdir()
        folder.checkpoint(2).write_text("new")
        replacing.drop_replaced(folder)
        raise UserError("not finite")
    assert content(folder) == {"notes.txt": "mine", "checkpoints/00000002.pt": "new"}


def test_a_new_one_that_was_killed_before_may_begin_again(folder: RunFolder) -> None:
    with pytest.raises(KeyboardInterrupt), replacing.replacing(folder):  # noqa: PT012
        folder.log.write_text("new")
        raise KeyboardInterrupt
    replacing.tidy(folder)
    with pytest.raises(UserError, match=r"holds a run already \(\.replaced/checkpoints/best\.pt\)"):
        replacing.require_no_run(folder)
    with pytest.raises(UserError), replacing.replacing(folder):
        raise UserError("no data")
    assert content(folder)["log.jsonl"] == "old"


@pytest.mark.parametrize("done", range(1, 7))
def test_half_a_move_is_undone(done: int, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed after so many of the renamings that set the earlier run aside, or bring it back."""
    before, rename = content(folder), Path.rename
    left = done

    def killed(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            replacing.replacing(folder).__enter__()
    replacing.tidy(folder)
    assert content(folder) == before

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), replacing.replacing(folder):  # noqa: PT012
        left = done
        patch.setattr(Path, "rename", killed)
        raise UserError("no data")
    replacing.tidy(folder)
    assert content(folder) == before


def test_a_kill_between_checkpoint_and_farewell_is_made_up(folder: RunFolder) -> None:
    context = replacing.replacing(folder)
    context.__enter__()
    folder.checkpoints.mkdir()
    folder.checkpoint(2).write_text("new")
    replacing.tidy(folder)
    assert content(folder) == {"notes.txt": "mine", "checkpoints/00000002.pt": "new"}


@pytest.mark.parametrize(
    ("kept", "advice"),
    [
        ("results.json", "it has no checkpoint to go on from"),
        ("checkpoints/best.pt", "continue it with --resume auto"),
        ("checkpoints/00000007.pt", "continue it with --resume auto"),
    ],
)
def test_whatever_is_worth_keeping_is_not_overwritten_unasked(kept: str, advice: str, tmp_path: Path) -> None:
    path = tmp_path / kept
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    with pytest.raises(UserError, match=rf"holds a run already \({kept}\); {advice}, replace"):
        replacing.require_no_run(RunFolder(tmp_path))


def test_half_written_files_of_killed_processes_go(folder: RunFolder) -> None:
    folder.observed.mkdir()
    before = content(folder)
    for place in (folder.path, folder.checkpoints, folder.observed):
        (place / f".best.pt.{os.getpid()}.partial").write_text("half")
    replacing.tidy(folder)
    assert content(folder) == before
