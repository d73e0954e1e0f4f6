"""bench/data.py measures every pipeline in turns, each in a process of its own."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from bench_support import assert_chart, assert_keys_of

from bench import data
from bench.views.comparison import compare, copy_images, read_speed
from bench.views.provider import Provider, measure
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.synthetic import generate
from cosa_fast.data_pipeline.views.parameters import AugmentConfig

DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images") / "set"
    generate(root, train=6, val=1, size=48)
    return root


@pytest.fixture(scope="module")
def copied(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copied") / "set"
    copy_images(open_dataset("voc", images, "train"), root, 4, None)
    return root


def provider(root: Path, pipeline: str, stage: str, *, packed: bool = False) -> Provider:
    return Provider(pipeline, 1, stage, root, root / "train.tar" if packed else None, AugmentConfig(32), 2, 0)


def test_providers_are_measured_in_processes_of_their_own(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.views.comparison.dali_problem", lambda device: "no time for it")
    out = tmp_path / "new" / "speed.json"
    settings = [f"data.root={images}", "data.train_split=train", "data.crop_size=32", "optim.batch_size=2"]
    numbers = ["--images", "4", "--windows", "2", "--batches", "3", "--workers", "1", "--stages", "both"]
    assert data.main(["voc.yaml", *settings, "run.device=cpu", *numbers, "--out", str(out)]) == 0
    printed = capfd.readouterr()
    assert printed.err == "", "worker processes end quietly"
    assert "without DALI: no time for it" in printed.out
    assert_chart(out.with_suffix(".png"))
    written = json.loads(out.read_text(encoding="utf-8"))
    assert_keys_of("data_cpu.json", written)
    assert (written["machine"]["file_cache"], written["machine"]["cores"] > 0) == ("warm", True)
    (result,) = written["results"]
    assert (result["stage"], result["crop"], result["batch_size"], result["batches"]) == ("both", 32, 2, 3)
    assert set(result["images"]["read_images_per_second"]) == {"files", "packed"}
    assert set(result["providers"]) == {"torch, 1 worker, files", "torch, 1 worker, packed"}
    for name, row in result["providers"].items():
        assert name in printed.out
        assert row["windows"] == 2
        assert 0 < row["images_per_second_20"] <= row["images_per_second"] <= row["images_per_second_80"]
        assert row["cpu_seconds_per_1000"] >= 0
        assert row["peak_rss_mib"] > 50


@pytest.mark.parametrize("stage", ["decode", "weak", "both"])
@pytest.mark.parametrize(
    "pipeline",
    ["torch", pytest.param("DALI", marks=pytest.mark.skipif(not DALI, reason="DALI is not installed"))],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_pipeline_has_every_stage(copied: Path, pipeline: str, stage: str, packed: bool) -> None:
    window = measure(provider(copied, pipeline, stage, packed=packed), 1)
    assert window.images == (40 if stage == "decode" else 2)
    assert window.seconds > 0


def test_images_are_copied_as_they_are_or_enlarged(images: Path, tmp_path: Path) -> None:
    dataset = open_dataset("voc", images, "train")
    same, larger = (copy_images(dataset, tmp_path / str(side), 4, side) for side in (None, 96))
    assert (same["images"], same["enlarged_to"], larger["enlarged_to"]) == (4, None, 96)
    assert same["mean_megapixels"] == pytest.approx(48 * 48e-6)
    assert larger["mean_megapixels"] == pytest.approx(96 * 96e-6)
    copies = {side: open_dataset("voc", tmp_path / side, "train") for side in ("None", "96")}
    packed = open_dataset("voc", tmp_path / "None", "train", pack=tmp_path / "None" / "train.tar")
    for index in range(4):
        assert copies["None"].encoded(index) == packed.encoded(index) == dataset.encoded(index)
        assert copies["96"].image(index).size == (96, 96)
    assert set(read_speed(tmp_path / "96")) == {"files", "packed"}


def test_a_provider_that_fails_is_recorded(monkeypatch: pytest.MonkeyPatch, copied: Path) -> None:
    served: dict[str, Any] = {}

    class Broken:
        error = "RuntimeError: no decoder"

        def __init__(self, one: Provider, batches: int) -> None:
            served[one.name] = self

        def window(self) -> None:
            return None

        def close(self) -> None:
            self.error = "closed"

    monkeypatch.setattr("bench.views.comparison.Served", Broken)
    found = compare([provider(copied, "torch", "both")], 2, 1)
    assert found == {"torch, 1 worker, files": {"error": "RuntimeError: no decoder"}}
    assert served["torch, 1 worker, files"].error == "closed"
