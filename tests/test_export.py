"""python -m cosa_fast.export: files that other programs run, equal to the network; what stands beside them; the hub."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from evaluation_support import CLASSES, TINY_MODEL, picture, random_network, save_networks
from PIL import Image

from cosa_fast import export, predict
from cosa_fast.config.schema import Config, DataConfig, EvalConfig, OptimConfig, TeacherConfig
from cosa_fast.errors import UserError
from cosa_fast.evaluation.exporting import FORMATS, InferenceModel, as_input, compare
from cosa_fast.evaluation.networks import Networks, load_networks
from cosa_fast.evaluation.seeing import see
from cosa_fast.run.checkpoint import save

CONFIG = Config(
    data=DataConfig(root="/home/somebody/secret", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3)),
    model=TINY_MODEL,
    teacher=TeacherConfig(scales=(1.0,)),
    eval=EvalConfig(scales=(1.0,), flip=False),
    optim=OptimConfig(cotrain_after=0),
)
SIZES = ((150, 210), (97, 64), (224, 224), (40, 333))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random networks in a run's folder with an evaluation."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("runs") / "mine"
    path = run / "checkpoints" / "best.pt"
    save_networks(path, random_network(0), random_network(1), CONFIG, iteration=7, thresholds=(0.4, 0.6))
    chosen = {"by": "seg_label_free", "of": "teacher", "value": 12.34, "on": "val", "images": 8, "identity": "x"}
    save(path, {**torch.load(path, weights_only=True), "chosen": chosen})
    (run / "config.yaml").write_text("{}")
    (run / "manifest.json").write_text(
        json.dumps({"commit": "abc", "seed": 3, "training_images": 5, "validation_images": 222})
    )
    record = {"kind": "eval_teacher", "iteration": 7, "seg_label_free": 12.34}
    record["evaluated_on"] = {"images": 8, "of": 222, "split": "val", "identity": "x"}
    (run / "log.jsonl").write_text(
        json.dumps({**record, "iteration": 6, "seg_label_free": 99.0}) + "\n" + json.dumps(record)
    )
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    return [picture(folder / f"{n}.png", width, height, n) for n, (height, width) in enumerate(SIZES)]


@pytest.fixture(scope="module")
def exported(checkpoint: Path, images: list[Path]) -> Path:
    """All formats in runs/mine/export."""
    for format in FORMATS:
        assert export.main([str(checkpoint), "--format", format, "--images", *map(str, images)]) == 0
    return checkpoint.parent.parent / "export"


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return as_input(image.convert("RGB"))


def test_every_format_gives_the_masks_of_prediction_at_any_size(
    exported: Path, checkpoint: Path, images: list[Path], tmp_path: Path
) -> None:
    networks = load_networks(checkpoint)
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(exported / "model.pt2").module()
    loaded = load_networks(exported / "model.safetensors")
    for path in images:
        with Image.open(path) as image:
            wanted = see(networks.an, CONFIG, image.convert("RGB")).segmentation
            found = see(loaded.an, loaded.config, image.convert("RGB")).segmentation
        assert torch.equal(found, wanted)
        segmentation, scores = session.run(None, {"images": pixels(path).numpy()})
        assert (segmentation[0].argmax(0) == wanted.numpy()).mean() >= 0.999
        assert scores.shape == (1, len(CLASSES))
        assert (program(pixels(path))[0][0].argmax(0) == wanted).float().mean() >= 0.999
    batch = torch.cat([pixels(images[0])] * 3)
    assert session.run(None, {"images": batch.numpy()})[0].shape == (3, 4, *SIZES[0])
    assert [value.shape for value in session.get_inputs()] == [["batch", 3, "height", "width"]]
    assert session.get_outputs()[0].shape == ["batch", 4, "height", "width"]


def test_predict_takes_the_safetensors(exported: Path, checkpoint: Path, images: list[Path], tmp_path: Path) -> None:
    for name, source in (("a", checkpoint), ("b", exported / "model.safetensors")):
        predict.main([str(source), str(images[0]), "-o", str(tmp_path / name), "--what", "cpl"])
    masks = [np.array(Image.open(tmp_path / name / "masks/0.png")) for name in "ab"]
    assert np.array_equal(*masks)
    loaded = load_networks(exported / "model.safetensors")
    assert (loaded.classes, loaded.iteration, loaded.imported) == (CLASSES, 7, None)
    assert loaded.thresholds == pytest.approx((0.4, 0.6))
    with pytest.raises(UserError, match=r"^--network on: has no effect, .* one network alone in .*safetensors; leave"):
        predict.main([str(exported / "model.safetensors"), str(images[0]), "-o", str(tmp_path), "--network", "on"])


def test_facts_and_card_stand_beside_it_without_places_of_this_machine(exported: Path) -> None:
    facts = json.loads((exported / "preprocessing.json").read_text())
    assert facts["classes"] == ["background", *CLASSES]
    assert facts["done in the graph"]["mean"] == [0.5, 0.4, 0.3]
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n")
    for text in ("12.3", "cat, dog, horse", "after 7 of", "test_vit", "## Limits", "## Licence", "5 images", "abc"):
        assert text in card, text
    assert "99.0" not in card, "the figures are those of this very state"
    assert "\nOn 8 of 222 images of val, mIoU in percent" in card, "as many as were evaluated"
    bias = "chosen by seg_label_free = 12.34 on 8 images of val: figures on the same images are too high"
    assert bias in card
    loaded = load_networks(exported / "model.safetensors")
    assert (loaded.bias_on("val", "other"), loaded.bias_on("test", "other"), loaded.bias_on(None, "x")) == (
        bias,
        None,
        bias,
    )
    for name in ("README.md", "preprocessing.json", "model.safetensors", "model.onnx"):
        assert b"somebody" not in (exported / name).read_bytes(), name


def test_a_card_without_an_evaluation_says_so(checkpoint: Path, images: list[Path], tmp_path: Path) -> None:
    alone = tmp_path / "alone.pt"
    alone.write_bytes(checkpoint.read_bytes())
    export.main([str(alone), "--images", str(images[0]), "--license", "apache-2.0", "--network", "on"])
    card = (tmp_path / "alone_export" / "README.md").read_text()
    assert "This state was not evaluated" in card
    assert "license: apache-2.0" in card
    assert "ON, the online network" in card


def test_without_images_noise_is_checked_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the images of a demo are not generated for it."""
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, data=DataConfig(format="synthetic", root="data/demo", train_split="train"))
    save_networks(Path("demo.pt"), random_network(0), random_network(1), config, iteration=7, thresholds=(0.4, 0.6))
    export.main(["demo.pt", "-o", "out"])
    assert "checked on 2 images of noise" in capsys.readouterr().out
    with pytest.raises(UserError, match="data/demo: no generated images"):
        predict.main(["demo.pt", "--split", "val", "-o", "out"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.pt", "out"]


def test_a_file_that_differs_is_not_written(
    checkpoint: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cosa_fast.evaluation.exporting._runner", lambda *_: lambda images: torch.rand(1, 4, *images.shape[2:])
    )
    with pytest.raises(UserError, match="of the pixels are as PyTorch's"):
        export.main([str(checkpoint), "-o", str(tmp_path / "out"), "--images", str(images[0])])
    assert not list((tmp_path / "out").iterdir())


def test_a_network_that_a_format_cannot_take_is_told_in_one_line(
    checkpoint: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no node for math.ceil\nTraceback ...")

    monkeypatch.setattr("cosa_fast.evaluation.exporting._write_program", refuse)
    arguments = [str(checkpoint), "--format", "torch-export", "-o", str(tmp_path / "out"), "--images", str(images[0])]
    with pytest.raises(
        UserError, match=r"torch-export: .*\(no node for math\.ceil\); nothing was written: take another"
    ):
        export.main(arguments)
    assert not list((tmp_path / "out").iterdir())


def test_an_output_that_is_a_file_is_told_before_the_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "export", lambda *_: pytest.fail("work"))
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"^-o .*/taken: cannot be written \(.*/taken is a file\); give another f"):
        export.main([str(checkpoint), "-o", str(tmp_path / "taken")])
    with pytest.raises(UserError, match=r"/taken is a file\); give another folder$"):
        export.main([str(checkpoint), "-o", str(tmp_path / "taken/below")])


def test_agreement_counts_pixels() -> None:
    networks = Networks(CONFIG, CLASSES, 0, random_network(0), random_network(1), (None, None))
    model = InferenceModel(networks.an, CONFIG).eval()

    def shifted(images: torch.Tensor) -> torch.Tensor:
        logits = model(images)[0].clone()
        logits[:, :, :1] += torch.tensor([0.0, 0.0, 0.0, 100.0])[None, :, None, None]  # the first row becomes class 3
        return logits

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    with torch.no_grad():
        before = (model(as_input(image))[0].argmax(1)[:, :1] == 3).sum()
    found = compare(shifted, model, [image])
    assert found.pixels == pytest.approx(1 - (64 - int(before)) / 64**2)
    assert found.largest == pytest.approx(100, rel=1e-3)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What is asked of the hub, in place of the hub."""
    asked: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> str:
            asked.append(("create", {"name": name, **options}))
            if "taken" in name:
                raise OSError("403 Forbidden\nsecond line")
            return f"https://hub/{name}"

        def upload_folder(self, **options: Any) -> None:
            asked.append(("upload", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return asked


def test_the_folder_is_published(
    checkpoint: Path, images: list[Path], tmp_path: Path, hub: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(checkpoint), "--images", str(images[0]), "-o", str(tmp_path), "--private"]
    assert export.main([*arguments, "--push-to-hub", "me/cosa"]) == 0
    (_, created), (_, uploaded) = hub
    assert created == {"name": "me/cosa", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/cosa"
    assert uploaded["folder_path"] == tmp_path
    assert {"README.md", "preprocessing.json", "model.safetensors"} <= set(uploaded["allow_patterns"])
    assert "published: https://hub/me/cosa" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"me/taken: 403 Forbidden; the files are in") as caught:
        export.main([*arguments, "--push-to-hub", "me/taken"])
    assert "\n" not in str(caught.value)


Damage = Callable[[dict[str, torch.Tensor], dict[str, str]], None]


@pytest.mark.parametrize(
    "damage",
    [
        lambda state, about: about.update(cosa_fast="{"),
        lambda state, about: about.update(cosa_fast=about["cosa_fast"].replace('"version": 1', '"version": 2')),
        lambda state, about: about.update(cosa_fast=about["cosa_fast"].replace('"thresholds"', '"th"')),
        lambda state, about: state.pop("classifier.weight"),
        lambda state, about: about.update(cosa_fast=json.dumps({"version": 1, "config": {"model": {"x": 1}}})),
    ],
)
def test_a_damaged_export_is_one_line(exported: Path, tmp_path: Path, damage: Damage) -> None:
    path = exported / "model.safetensors"
    state = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        about = dict(file.metadata())
    damage(state, about)
    safetensors.torch.save_file(state, tmp_path / "damaged.safetensors", about)
    with pytest.raises(UserError, match=r"damaged\.safetensors"):
        load_networks(tmp_path / "damaged.safetensors")


def test_a_missing_package_is_named(
    checkpoint: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install .*\[export\]"):
        export.main([str(checkpoint), "--format", "onnx", "-o", str(tmp_path), "--images", str(images[0])])
