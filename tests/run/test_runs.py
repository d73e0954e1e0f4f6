"""Whole runs on disk: what they leave, what they refuse, and how they end when something is wrong."""

import importlib.metadata
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from cosa_fast import api
from cosa_fast.cli import run_cli
from cosa_fast.config.parsing import config_from_dict, config_to_dict, load_config
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.views.parameters import image_index
from cosa_fast.errors import UserError
from cosa_fast.evaluation.networks import NAMES_IN_FILES, load
from cosa_fast.method.objective import Objective
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.training import train
from cosa_fast.train import main

MakeConfig = Callable[..., Config]
TERMS = ("cls", "cls_aux", "c2s", "c2s_aux", "s2c", "csc")


def write(config: Config, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config_to_dict(config)), encoding="utf-8")
    return path


def records(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a nested state."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors(item)]


@pytest.fixture(scope="module")
def run(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A run through the command line's own entry: checkpoints every 2nd of 6 iterations, the last 2 kept."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("run")
    overrides = [f"run.output={output}", "run.checkpoint_every=2", "run.keep=2", "eval.every=4", "loss.alpha=0.7"]
    config = config_from_dict(tiny_values, overrides, where="tiny")
    assert main([str(write(config, output / "given.yaml")), "run.name=whole"]) == 0
    return output / "whole", config


# What a run leaves


def test_configuration_on_disk_is_the_run_s(run: tuple[Path, Config]) -> None:
    directory, config = run
    written = load_config(directory / "config.yaml")
    assert written.run.name == "whole"
    assert config_to_dict(written) | {"run": None} == config_to_dict(config) | {"run": None}
    assert load_config(directory / "config.yaml", ["run.name=tiny"]) == config


def test_manifest_says_what_the_run_was_made_with(run: tuple[Path, Config]) -> None:
    directory, config = run
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))

    assert manifest["packages"]["torch"] == importlib.metadata.version("torch")
    assert {"timm", "numpy", "pillow"} <= manifest["packages"].keys()
    assert manifest["python"] == sys.version.split()[0]
    assert "commit" in manifest
    assert (manifest["seed"], manifest["device"], manifest["threads"]) == (config.run.seed, "cpu", 1)
    assert manifest["data_fingerprint"] == open_dataset("voc", config.data.root, "train").fingerprint()
    assert (manifest["training_images"], manifest["validation_images"]) == (8, 2)
    assert "before" not in manifest


def test_log_has_every_term_and_the_speed(run: tuple[Path, Config]) -> None:
    directory, config = run
    lines = records(directory, "train")

    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        cotraining = line["iteration"] > config.optim.cotrain_after
        expected = {"loss", "lr", "images_per_second", "seconds_per_iteration", "data_wait", "cls", "cls_aux"}
        expected |= {*TERMS, "xi", "xi_aux", "omega", "perplexity", "foreground_share"} if cotraining else set()
        assert expected <= line.keys()
        assert all(math.isfinite(line[name]) for name in expected)
        assert ("c2s" in line) == cotraining
        assert line["images_per_second"] == pytest.approx(2 / line["seconds_per_iteration"])
        assert 0 <= line["data_wait"] <= 1


def test_log_lines_average_the_steps_between_them(run: tuple[Path, Config], make_config: MakeConfig) -> None:
    directory = train(make_config("run.log_every=3", "loss.alpha=0.7")).directory
    fine, coarse = records(run[0], "train"), records(directory, "train")

    assert [line["iteration"] for line in coarse] == [3, 6]
    assert coarse[1]["c2s"] == pytest.approx(sum(line["c2s"] for line in fine[3:]) / 3)


def test_evaluations_are_logged_for_both_networks(run: tuple[Path, Config]) -> None:
    for network in ("student", "teacher"):
        lines = records(run[0], f"eval_{network}")
        assert [line["iteration"] for line in lines] == [4, 6]
        assert all(0 <= line["seg_label_free"] <= 100 for line in lines)
        for line in lines:
            assert line["cam_threshold_loss"] == pytest.approx(line["cam_best"] - line["cam_at_threshold"])
            assert 0 <= line["foreground_share_cam"] <= 1
            assert 0 < line["foreground_share_true"] < 1


def test_tensorboard_has_the_same_figures(run: tuple[Path, Config]) -> None:
    events = EventAccumulator(str(run[0] / "tensorboard"))
    events.Reload()
    expected = [(line["iteration"], line["loss"]) for line in records(run[0], "train")]

    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("train/loss")] == expected
    assert {"train/xi", "eval_ON/seg_label_free", "eval_AN/seg_label_free"} <= set(events.Tags()["scalars"])


def test_last_checkpoints_and_the_best_are_kept(run: tuple[Path, Config]) -> None:
    names = {path.name for path in (run[0] / "checkpoints").iterdir()}
    assert names == {"00000004.pt", "00000006.pt", "best.pt"}
    scores = {line["iteration"]: line["seg_label_free"] for line in records(run[0], "eval_teacher")}
    assert scores[load(run[0] / "checkpoints" / "best.pt")["iteration"]] == max(scores.values())


def test_results_and_gallery_are_there_at_the_end(run: tuple[Path, Config]) -> None:
    results = json.loads((run[0] / "results.json").read_text(encoding="utf-8"))
    assert results["iteration"] == 6
    assert {key: results["evaluated_on"][key] for key in ("images", "of", "split")} == {
        "images": 2,
        "of": 2,
        "split": "val",
    }
    rows = (run[0] / "results.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0].endswith(",evaluated_images,of_images")
    assert all(row.endswith(",2,2") for row in rows[1:])
    for network in ("student", "teacher"):
        assert results[network]["seg_label_free"] == records(run[0], f"eval_{network}")[-1]["seg_label_free"]
    with Image.open(run[0] / "gallery.png") as picture:
        picture.load()
        assert min(picture.size) > 64


def test_best_checkpoint_evaluates_to_what_the_run_logged_of_it(run: tuple[Path, Config]) -> None:
    best = run[0] / "checkpoints" / "best.pt"
    iteration = load(best)["iteration"]
    for name, result in api.evaluate(best).items():
        kind = f"eval_{NAMES_IN_FILES[name]}"
        logged = next(record for record in records(run[0], kind) if record["iteration"] == iteration)
        expected = {key: value for key, value in result.summary().items() if value == value}
        assert {key: logged[key] for key in expected} == expected
        assert "cam_at_threshold" in expected


# What a run refuses


def test_an_existing_run_is_refused_and_left_alone(run: tuple[Path, Config], make_config: MakeConfig) -> None:
    config = make_config(f"run.output={run[0].parent}", "run.name=whole")
    before = {path: path.stat().st_mtime_ns for path in run[0].rglob("*") if path.is_file()}

    with pytest.raises(UserError, match=r"holds a run already .*--resume auto.*--overwrite"):
        train(config)
    for mistake in ("data.root=nowhere", "data.crop_size=60", "eval.classes=[dot]", "model.weights=no.pt"):
        key = mistake.partition("=")[0]
        with pytest.raises(UserError, match="no PASCAL VOC images" if key == "data.root" else key):
            train(make_config(f"run.output={run[0].parent}", "run.name=whole", mistake))

    assert {path: path.stat().st_mtime_ns for path in run[0].rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["best.pt", "last_good.pt"])
def test_a_run_of_which_one_checkpoint_is_left_is_refused_too(name: str, make_config: MakeConfig) -> None:
    config = make_config()
    path = Path(config.run.output) / config.run.name / "checkpoints" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"precious")
    with pytest.raises(UserError, match="holds a run already"):
        train(config)
    assert path.read_bytes() == b"precious"


def test_a_run_is_not_continued_and_replaced_at_once(make_config: MakeConfig) -> None:
    config = make_config()
    with pytest.raises(UserError, match=r"^--resume auto with --overwrite: .*; leave one out$"):
        train(config, resume="auto", overwrite=True)
    assert not RunFolder.of(config).path.exists()


def test_overwriting_leaves_nothing_of_the_old_run(run: tuple[Path, Config], make_config: MakeConfig) -> None:
    config = make_config("run.name=whole", "optim.iterations=2", "optim.cotrain_after=2")
    directory = Path(config.run.output) / "whole"
    shutil.copytree(run[0], directory)
    (directory / "profile").mkdir()
    (directory / "profile" / "top.txt").write_text("old")
    gallery = (directory / "gallery.png").read_bytes()
    train(config, overwrite=True)

    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"00000002.pt", "best.pt"}
    assert [line["iteration"] for line in records(directory, "train")] == [1, 2]
    assert (directory / "gallery.png").read_bytes() != gallery
    assert json.loads((directory / "results.json").read_text(encoding="utf-8"))["iteration"] == 2
    assert not (directory / "profile" / "top.txt").exists()
    assert "before" not in json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    assert len(list((directory / "tensorboard").iterdir())) == 1


def test_a_crop_that_does_not_fit_the_stride_is_refused_before_an_old_run_is_replaced(make_config: MakeConfig) -> None:
    config = make_config("data.crop_size=60")
    old = RunFolder.of(config).best
    old.parent.mkdir(parents=True)
    old.write_bytes(b"precious")
    with pytest.raises(UserError, match=r"data.crop_size = 60 .*stride, 8"):
        train(config, overwrite=True)
    assert old.read_bytes() == b"precious"


@pytest.mark.parametrize("problem", [["data.root=/nonexistent"], ["model.backbone=none"], ["run.device=gpu7"]])
def test_an_earlier_run_stays_when_the_one_that_overwrites_it_cannot_begin(
    problem: list[str], run: tuple[Path, Config], make_config: MakeConfig
) -> None:
    directory = run[0]
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(UserError):
        train(make_config(f"run.output={directory.parent}", "run.name=whole", *problem), overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()} == before


def test_an_earlier_run_comes_back_when_the_one_that_overwrites_it_fails_before_its_first_checkpoint(
    run: tuple[Path, Config], make_config: MakeConfig, data_root: Path, tmp_path: Path
) -> None:
    root, directory = tmp_path / "data", tmp_path / "runs" / "whole"
    shutil.copytree(run[0], directory)
    shutil.copytree(data_root, root)
    for image in (root / "JPEGImages").glob("train_*.jpg"):
        image.write_bytes(image.read_bytes()[:700])
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="JPEGImages"):
        train(make_config("run.name=whole", f"data.root={root}"), overwrite=True)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("key", ["eval.classes", "eval.coexistence"])
def test_unknown_classes_of_the_evaluation_are_refused(key: str, make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=rf"{key}: 'unicorn' is not a class"):
        train(make_config(f"{key}=[unicorn]"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"run.device = cuda"):
        train(make_config("run.device=cuda"))


# Runs that go wrong


def test_a_loss_that_is_not_finite_stops_the_run_with_a_good_checkpoint(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    same: Callable[[Any, Any], bool],
) -> None:
    """csc enters after iteration 3 with an infinite weight: everything before is sound, and is what remains."""
    four = "optim.iterations=4"
    good = train(make_config(four, "run.name=good", "run.checkpoint_every=1"))
    file = write(make_config(four), tmp_path / "bad.yaml")
    monkeypatch.setattr(sys, "argv", ["train", str(file)])
    capsys.readouterr()
    build = Objective.__init__

    def with_infinite_weight(self: Objective, *arguments: Any) -> None:
        build(self, *arguments)
        self.weights["csc"] = math.inf  # which no configuration may say

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__init__", with_infinite_weight)
        assert run_cli(main) == 2

    captured = capsys.readouterr()
    assert captured.err.startswith("error: iteration 3: loss is not finite; ")
    assert captured.err.count("\n") == 1
    path = tmp_path / "runs" / "tiny" / "checkpoints" / "last_good.pt"
    assert str(path) in captured.err
    state, expected = load(path), load(good.directory / "checkpoints" / "00000003.pt")
    assert all(torch.isfinite(tensor).all() for tensor in tensors(state) if tensor.is_floating_point())
    assert all(same(state[key], expected[key]) for key in ("iteration", "student", "teacher", "thresholds"))

    resumed = train(make_config(four, "run.name=resumed"), resume=str(path))
    final = [load(s.directory / "checkpoints" / "00000004.pt")["student"] for s in (good, resumed)]
    assert same(*final)


def test_an_exploding_learning_rate_names_iteration_and_remedy(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"iteration \d: cls is not finite; .*lower optim.lr") as caught:
        train(make_config("optim.lr=1e30", "optim.warmup=0"))
    assert "\n" not in str(caught.value)
    state = load(tmp_path / "runs" / "tiny" / "checkpoints" / "last_good.pt")
    assert all(torch.isfinite(tensor).all() for tensor in tensors(state) if tensor.is_floating_point())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_in_the_middle_ends_with_its_name_and_a_checkpoint(
    workers: int,
    make_config: MakeConfig,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "data"
    shutil.copytree(data_root, root)
    # The fifth sample of the order: batches are pairs, so that two steps go well.
    image = root / "JPEGImages" / f"train_{image_index(0, 4, 8):05d}.jpg"
    image.write_bytes(image.read_bytes()[:700])
    config = make_config(f"data.root={root}", f"data.workers={workers}", "optim.iterations=4")
    monkeypatch.setattr(sys, "argv", ["train", str(write(config, tmp_path / "config.yaml"))])

    assert run_cli(main) == 2

    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert str(image) in captured.err
    assert captured.err.count("\n") == 1
    assert load(tmp_path / "runs" / "tiny" / "checkpoints" / "00000002.pt")["iteration"] == 2
    # The order of the data is kept: with the image whole again the run goes on.
    shutil.copy(data_root / "JPEGImages" / image.name, image)
    assert train(config, resume="auto").iteration == 4


# Masks


def without_training_masks(data_root: Path, root: Path) -> Path:
    shutil.copytree(data_root, root)
    for mask in (root / "SegmentationClass").glob("train_*.png"):
        mask.unlink()
    return root


def test_training_never_opens_a_mask(
    run: tuple[Path, Config], make_config: MakeConfig, data_root: Path, tmp_path: Path
) -> None:
    root = without_training_masks(data_root, tmp_path / "data")
    directory = train(make_config(f"data.root={root}", "loss.alpha=0.7")).directory

    losses = [[line["loss"] for line in records(each, "train")] for each in (directory, run[0])]
    assert losses[0] == losses[1]


def test_the_oracle_s_guidance_does_read_them(
    run: tuple[Path, Config], make_config: MakeConfig, data_root: Path, tmp_path: Path
) -> None:
    directory = train(make_config("loss.guidance=truth", "loss.alpha=0.7")).directory
    guided, usual = ([line.get("s2c") for line in records(each, "train")] for each in (directory, run[0]))
    assert guided[:3] == usual[:3] == [None] * 3
    assert all(with_truth != without for with_truth, without in zip(guided[3:], usual[3:], strict=True))

    root = without_training_masks(data_root, tmp_path / "data")
    with pytest.raises(UserError, match="mask"):
        train(make_config("loss.guidance=truth", f"data.root={root}", "run.name=none"))
