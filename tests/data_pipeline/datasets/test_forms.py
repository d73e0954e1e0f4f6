"""docs/data.md lists every form of labels, lists, images and masks; each of its rows names the test that shows it."""

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.errors import UserError

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[2] / "docs" / "data.md"
TILE = Image.new("RGB", (6, 4), (90, 90, 90))


def rows() -> list[str]:
    text = DOCS.read_text(encoding="utf-8")
    section = text[text.index("## Every form of labels") : text.index("## What is the same")]
    return [line for line in section.splitlines() if line.startswith("| ") and not line.endswith("| test |")]


def known_tests(name: str) -> set[str]:
    tree = ast.parse((HERE / f"test_{name}.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_documentation_is_a_test() -> None:
    assert len(rows()) > 60
    for row in rows():
        named = re.findall(r"`(\w+)\.(\w+)`", row.rstrip("| ").rpartition(" | ")[2])
        assert named, row
        for name, test in named:
            assert f"test_{test}" in known_tests(name), row


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """folder(*names): images of these names and a label file; returns ROOT."""

    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            TILE.save(tmp_path / name)
        (tmp_path / "labels.csv").write_text("".join(f"{Path(name).name},cat\n" for name in names))
        return tmp_path

    return make


@pytest.mark.parametrize("line", ["a.jpg", "a", "A.JPG", "a.png", "./a.jpg", "photos\\a.jpg", " a.jpg \r"])
def test_every_form_of_a_line_in_a_folder_s_list(folder: Callable[..., Path], line: str) -> None:
    root = folder("images/a.jpg", "images/b.PNG")
    (root / "train.txt").write_text(f"b\n{line}\n")
    assert open_dataset("folder", root, "train").ids == ("b", "a")
    (root / "train.txt").write_text("b\nab.jpg\n")
    with pytest.raises(UserError, match=r"train\.txt: 1 of 2 listed images are missing, first .*ab\.jpg"):
        open_dataset("folder", root, "train")


@pytest.mark.parametrize("place", ["images/train", "train", "images", ".", "images/deeper", "deeper/still"])
def test_every_place_of_images_in_a_folder(folder: Callable[..., Path], place: str) -> None:
    dataset = open_dataset("folder", folder(f"{place}/a.jpg", f"{place}/b.PNG"), "train")
    assert [id.rpartition("/")[2] for id in dataset.ids] == ["a", "b"]
