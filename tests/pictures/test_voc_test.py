"""The archive for the VOC test server: where its files are, and what is refused before it is sent."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_fast.data_pipeline.datasets.voc import CLASSES
from cosa_fast.errors import UserError
from cosa_fast.pictures.palette import palette_image
from cosa_fast.pictures.voc_test import check, check_classes, pack

SIZES = {"2008_000006": (30, 20), "2008_000011": (20, 10)}


@pytest.fixture
def masks(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / "masks" / f"{name}.png" for name in SIZES}
    (tmp_path / "masks").mkdir()
    for index, (name, path) in enumerate(paths.items()):
        palette_image(np.full(SIZES[name][::-1], 20 * index, np.uint8)).save(path)
    return paths


def test_the_archive_has_the_servers_layout(masks: dict[str, Path], tmp_path: Path) -> None:
    archive = tmp_path / "comp6.tgz"
    pack(masks, archive, "comp6")
    check(archive, SIZES, "comp6")
    with tarfile.open(archive, "r:gz") as tar:
        assert sorted(tar.getnames()) == [
            f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png" for name in sorted(SIZES)
        ]
        assert {(entry.uname, entry.mtime) for entry in tar} == {("", 0)}, "nobody's name goes out"


def test_what_the_server_would_not_take_is_named(masks: dict[str, Path], tmp_path: Path) -> None:
    archive = tmp_path / "comp6.tgz"
    pack(masks, archive, "comp6")
    with pytest.raises(UserError, match="does not belong there"):
        check(archive, SIZES, "comp5")
    with pytest.raises(UserError, match="1 image missing, the first is 2008_000099"):
        check(archive, {**SIZES, "2008_000099": (5, 5)}, "comp6")
    with pytest.raises(UserError, match="does not belong"):
        check(archive, {"2008_000006": (30, 20)}, "comp6")
    with pytest.raises(UserError, match="30x20, P, up to 0; wanted 31x20"):
        check(archive, {**SIZES, "2008_000006": (31, 20)}, "comp6")
    palette_image(np.full((20, 30), 255, np.uint8)).save(masks["2008_000006"])
    pack(masks, archive, "comp6")
    with pytest.raises(UserError, match="up to 255"):
        check(archive, SIZES, "comp6")
    Image.new("RGB", (30, 20)).save(masks["2008_000006"])
    pack(masks, archive, "comp6")
    with pytest.raises(UserError, match="RGB"):
        check(archive, SIZES, "comp6")


def test_other_classes_are_refused() -> None:
    check_classes(CLASSES)
    with pytest.raises(UserError, match="differs: dog"):
        check_classes(("dog", *CLASSES[1:]))
    with pytest.raises(UserError, match="their number"):
        check_classes(CLASSES[:5])
