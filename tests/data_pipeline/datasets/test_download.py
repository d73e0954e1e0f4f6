"""VOC2012 and SBD by torchvision's downloaders, from a server of this machine with archives of a few files."""

import hashlib
import io
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import cosa_fast.network.torchvision_compat  # noqa: F401 - torchvision may not be imported by itself
from cosa_fast.data_pipeline.datasets import download, voc
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.errors import UserError
from cosa_fast.prepare import main

VOC = "VOCtrainval_11-May-2012.tar"
SBD = "benchmark.tgz"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 6), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (90, 90, 90)).save(stream, "JPEG")
    return stream.getvalue()


def mat(value: int) -> bytes:
    io_module = pytest.importorskip("scipy.io")
    stream = io.BytesIO()
    io_module.savemat(stream, {"GTcls": {"Segmentation": np.full((4, 6), value, np.uint8)}})
    return stream.getvalue()


def archive(path: Path, mode: str, files: dict[str, bytes]) -> str:
    """Write a tar; returns its md5."""
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files are at torchvision's addresses; it holds both archives."""
    from torchvision.datasets import SBDataset
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    served = tmp_path / "served"
    served.mkdir()
    base = "VOCdevkit/VOC2012"
    lists = {"train": "2007_1\n", "val": "2007_2\n", "trainval": "2007_1\n2007_2\n"}
    files = {f"{base}/ImageSets/Segmentation/{name}.txt": text.encode() for name, text in lists.items()}
    files |= {f"{base}/JPEGImages/{id}.jpg": jpeg() for id in ("2007_1", "2007_2", "2008_3")}
    files |= {f"{base}/SegmentationClass/{id}.png": png(8) for id in ("2007_1", "2007_2")}
    files |= {
        f"{base}/Annotations/{id}.xml": b"<annotation><object><name>cat</name></object></annotation>"
        for id in ("2007_1", "2007_2", "2008_3")
    }
    sums = {VOC: archive(served / VOC, "w", files)}
    base = "benchmark_RELEASE/dataset"
    files = {f"{base}/cls/{id}.mat": mat(3) for id in ("2007_1", "2007_2", "2008_3")}
    files |= {f"{base}/img/2008_3.jpg": jpeg(), f"{base}/inst/2008_3.mat": b"", f"{base}/train.txt": b"2008_3\n"}
    sums[SBD] = archive(served / SBD, "w:gz", files | {f"{base}/val.txt": b"2007_1\n"})

    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served)))
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(DATASET_YEAR_DICT["2012"], "url", f"{address}/{VOC}")
    monkeypatch.setitem(DATASET_YEAR_DICT["2012"], "md5", sums[VOC])
    monkeypatch.setattr(SBDataset, "url", f"{address}/{SBD}")
    monkeypatch.setattr(SBDataset, "md5", sums[SBD])
    monkeypatch.setattr(voc, "TRAIN_AUG", 2)
    monkeypatch.setattr(download, "VOC_BYTES", 1000)
    monkeypatch.setattr(download, "SBD_BYTES", 1000)
    yield served
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def get(tmp_path: Path) -> Callable[..., int]:
    return lambda what, *options: main([what, "--download", "--root", str(tmp_path / "data"), *options])


def test_voc_and_sbd_are_loaded_and_joined(
    server: Path, get: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data" / "VOCdevkit" / "VOC2012"
    with pytest.raises(UserError, match=r"no SegmentationClass there.* cosa_fast.prepare voc --download"):
        get("sbd")
    assert get("voc") == 0
    assert f"{root}: 3 images" in capsys.readouterr().out
    (server / VOC).unlink()
    assert get("voc", "--split", "train", "--workers", "0") == 0, "what is there is not loaded again"
    assert "is there already" in capsys.readouterr().out

    assert get("sbd", "--split", "train_aug", "--workers", "0") == 0
    assert f"{root / 'SegmentationClassAug'}: 3 masks" in capsys.readouterr().out
    dataset = open_dataset("voc", tmp_path / "data", "train_aug")
    assert dataset.ids == ("2007_1", "2008_3")
    assert [int(dataset.mask(k).max()) for k in range(2)] == [8, 3], "VOC's own masks go before SBD's"
    (server / SBD).unlink()
    assert get("sbd") == 0


def test_what_was_broken_off_is_begun_again(server: Path, get: Callable[..., int], tmp_path: Path) -> None:
    get("voc")
    get("sbd")
    root = tmp_path / "data"
    (root / "SBD" / "val.txt").unlink()
    shutil.rmtree(root / "VOCdevkit/VOC2012/SegmentationClassAug")
    assert get("sbd") == 0
    assert (root / "VOCdevkit/VOC2012/SegmentationClassAug/2008_3.png").is_file()


def test_another_checksum_is_refused(server: Path, get: Callable[..., int]) -> None:
    content = bytearray((server / VOC).read_bytes())
    content[3000] ^= 1
    (server / VOC).write_bytes(content)
    with pytest.raises(UserError, match="has not the published checksum"):
        get("voc")
    content[3000] ^= 1
    (server / VOC).write_bytes(content)
    assert get("voc") == 0, "a damaged archive does not stay"


def test_no_server_and_no_room_are_said(server: Path, get: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    (server / VOC).unlink()
    with pytest.raises(UserError, match=r"the download failed \(HTTP Error 404"):
        get("voc")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000_000))
    monkeypatch.setattr(download, "VOC_BYTES", 4_200_000_000)
    with pytest.raises(UserError, match=r"VOC2012 needs 4\.2 GB with its archive, and 2\.0 GB are free"):
        get("voc")


def test_the_wrong_number_of_masks_is_refused(
    server: Path, get: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    get("voc")
    monkeypatch.setattr(voc, "TRAIN_AUG", 10_582)
    with pytest.raises(UserError, match=r"2 masks besides those of val\.txt, but train_aug has 10582 images"):
        get("sbd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coco", "--download", "--root", "x"], "--download: gets voc or sbd, not coco"),
        (["sbd", "--root", "x"], "sbd: can be downloaded only"),
        (["voc", "--format", "coco", "--root", "x"], "voc and --format coco: which of them"),
        (["--root", "x"], "--format: one of voc, coco, folder"),
    ],
)
def test_command_lines_that_mean_nothing(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments)
