"""Small files: whole or as they were, JSON that every reader takes, errors that name path and remedy."""

import json
import math
import os
from pathlib import Path

import pytest

from cosa_fast.errors import UserError
from cosa_fast.files import nearest, read_json, require_place, write_json, write_text, written_aside


def test_a_file_is_replaced_when_the_block_is_done(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old")
    with written_aside(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["a.txt"]


def test_the_nearest_name_is_that_of_the_first_part_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs/voc").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert nearest(Path("rnus/voc/best.pt")) == " (did you mean 'runs'?)"
    assert nearest(Path("runs/vco/best.pt")) == " (did you mean 'runs/voc'?)"
    assert nearest(tmp_path / "runs/vco") == f" (did you mean '{tmp_path}/runs/voc'?)"
    (tmp_path / "folder.yaml").touch()
    assert nearest(Path("foldre.yaml")) == " (did you mean 'folder.yaml'?)"
    assert nearest(Path("nowhere.yaml")) == ""  # the common ending counts for nothing
    assert [nearest(Path(name)) for name in ("elsewhere", "x" * 5000, "a\0b")] == ["", "", ""]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_the_file_as_it_was(failure: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises((UserError, KeyboardInterrupt)) as caught, written_aside(path, "free some") as aside:  # noqa: PT012
        aside.write_text("half")
        raise failure
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
    if isinstance(caught.value, UserError):
        assert str(caught.value) == f"{path}: cannot be written (No space left on device); free some"


def test_content_and_name_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before it is renamed, its folder after that."""
    path, seen = tmp_path / "a.txt", []
    monkeypatch.setattr(os, "fsync", lambda file: seen.append((os.fstat(file).st_ino, path.exists())))
    write_text(path, "text")
    assert seen == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_a_place_that_is_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}: cannot be written \(.*\); choose another place$"):
        write_text(tmp_path, "text")


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"IoU": (1.5, math.nan), "ξ": {"inf": math.inf, "name": "nan"}})
    text = path.read_text(encoding="utf-8")
    assert text.startswith('{\n  "IoU": [')
    assert text.endswith("}\n")
    assert "ξ" in text
    assert read_json(path) == {"IoU": [1.5, None], "ξ": {"inf": None, "name": "nan"}}
    json.loads(text, parse_constant=lambda constant: pytest.fail(constant))


def test_a_place_is_judged_without_making_anything(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, folder in ((tmp_path / "new/below/x.json", False), (tmp_path / "file", False), (tmp_path, True)):
        require_place(path, "-o", folder=folder)
    refusals = {
        (tmp_path, False): "it is a folder",
        (tmp_path / "file/x.json", False): "file is a file",
        (tmp_path / "file", True): "file is a file",
        (tmp_path / f"{'a' * 300}/x", True): "File name too long",
    }
    for (path, folder), reason in refusals.items():
        with pytest.raises(UserError, match=rf"^-o .*: cannot be written \(.*{reason}\); give another f"):
            require_place(path, "-o", folder=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
