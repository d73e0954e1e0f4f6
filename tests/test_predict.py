"""python -m cosa_fast.predict: what is written, what is never touched, and what happens when something is wrong."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_support import (
    CLASSES,
    TINY_MODEL,
    block_masks,
    picture,
    random_network,
    save_networks,
    write_voc,
)
from PIL import Image

from cosa_fast import cli, predict
from cosa_fast.config.schema import Config, DataConfig, EvalConfig, OptimConfig
from cosa_fast.errors import UserError
from cosa_fast.evaluation.cam import strongest
from cosa_fast.evaluation.networks import load_networks
from cosa_fast.evaluation.seeing import see


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of tiny random networks."""
    torch.set_num_threads(1)
    config = Config(data=DataConfig(workers=1), model=TINY_MODEL, eval=EvalConfig(scales=(1.0, 0.5)))
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
    return save_networks(path, random_network(0), random_network(1), config)


def indices(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.array(image)


def test_pixels_of_the_png_are_the_class_indices(trained: Path, tmp_path: Path) -> None:
    source = picture(tmp_path / "in" / "a.png")
    output = tmp_path / "out"
    assert predict.main([str(trained), str(source), "-o", str(output)]) == 0
    networks = load_networks(trained)
    with Image.open(source) as image:
        expected = see(networks.an, networks.config, image.convert("RGB")).segmentation.numpy()
    assert len(np.unique(expected)) > 1
    assert np.array_equal(indices(output / "masks/a.png"), expected)
    with Image.open(output / "overlays/a.jpg") as image:
        assert image.size == (100, 70)


def test_network_and_scales_are_those_asked_for(trained: Path, tmp_path: Path) -> None:
    source = picture(tmp_path / "a.jpg", 64, 64)
    results = []
    options = ([], ["--network", "on"], ["--scales", "[1.5,2]"], ["--network", "teacher"], ["--network", "student"])
    for number, each in enumerate(options):
        output = tmp_path / str(number)
        predict.main([str(trained), str(source), "-o", str(output), *each])
        results.append(indices(output / "masks/a.png"))
    assert not np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    assert np.array_equal(results[0], results[3])
    assert np.array_equal(results[1], results[4])


def test_labels_limit_what_may_be_predicted(trained: Path, tmp_path: Path) -> None:
    source = picture(tmp_path / "a.jpg", 64, 64)
    free, aware = tmp_path / "free", tmp_path / "aware"
    predict.main([str(trained), str(source), "-o", str(free)])
    missing = next(index for index in (1, 2, 3) if (indices(free / "masks/a.png") == index).any())
    others = [name for index, name in enumerate(CLASSES, start=1) if index != missing]
    predict.main([str(trained), str(source), "-o", str(aware), "--labels", ", ".join(others)])
    assert not (indices(aware / "masks/a.png") == missing).any()


def test_folders_are_searched_for_images_and_everything_written_is_printed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    picture(folder / "b.jpg")
    picture(folder / "a.PNG", 20, 60)
    (folder / "notes.txt").write_text("not an image")
    (folder / "folder.jpg").mkdir()
    extra = picture(tmp_path / "c.jpg")
    output = tmp_path / "new" / "out"
    predict.main([str(trained), str(folder), str(extra), str(folder / "b.jpg"), "-o", str(output)])
    names = sorted(str(path.relative_to(output)) for path in output.rglob("*.*"))
    wanted = [f"masks/{name}.png" for name in "abc"]
    assert names == [*wanted, *(f"overlays/{name}.jpg" for name in "abc"), "scores.json"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    assert all(any(str(output / name) in line for line in printed) for name in (*wanted, "scores.json"))


def test_unreadable_image_costs_no_other_and_gives_status_2(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    picture(folder / "a.jpg")
    whole = picture(folder / "b.jpg", 300, 300).read_bytes()
    (folder / "b.jpg").write_bytes(whole[: len(whole) // 2])
    picture(folder / "c.jpg")
    output = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["predict", str(trained), str(folder), "-o", str(output)])
    assert cli.run_cli(predict.main) == 2
    assert sorted(path.name for path in output.glob("masks/*.png")) == ["a.png", "c.png"]
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("error: 1 of 3 images unreadable, the others are written")
    assert "b.jpg" in errors[-1]


def test_a_crf_cleans_what_is_predicted_and_damaged_images_do_not_stop_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        picture(folder / name, 40, 28)
    (folder / "b.jpg").write_bytes(b"nothing")
    plain, clean = tmp_path / "plain", tmp_path / "clean"
    for output, options in ((plain, []), (clean, ["--crf", "ours"])):
        with pytest.raises(UserError, match="1 of 3 images unreadable"):
            predict.main([str(trained), str(folder), "-o", str(output), *options])
    assert sorted(path.name for path in clean.glob("masks/*.png")) == ["a.png", "c.png"]
    assert not np.array_equal(indices(plain / "masks/a.png"), indices(clean / "masks/a.png"))
    assert capsys.readouterr().out.count("(CRF ") == 2


def test_inputs_are_never_overwritten(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    source = picture(folder / "masks" / "a.png")
    before = source.read_bytes()
    with pytest.raises(UserError, match="would be overwritten"):
        predict.main([str(trained), str(source), "-o", str(folder)])
    assert source.read_bytes() == before
    jpeg = picture(folder / "b.jpg")
    os.link(jpeg, folder / "masks" / "b.png")  # another name of the same input
    with pytest.raises(UserError, match="would be overwritten"):
        predict.main([str(trained), str(jpeg), "-o", str(folder)])


def test_result_of_one_image_that_is_another_input_is_refused(trained: Path, tmp_path: Path) -> None:
    first, second = picture(tmp_path / "a.jpg"), picture(tmp_path / "overlays" / "a.jpg")
    with pytest.raises(UserError, match=r"overlays/a\.jpg is an input"):
        predict.main([str(trained), str(first), str(tmp_path / "overlays"), "-o", str(tmp_path)])
    assert second.is_file()


def test_two_images_of_one_name_are_refused_before_anything_is_written(trained: Path, tmp_path: Path) -> None:
    first, second = picture(tmp_path / "x" / "a.jpg"), picture(tmp_path / "y" / "a.png")
    output = tmp_path / "out"
    with pytest.raises(UserError, match="two folders"):
        predict.main([str(trained), str(first), str(second), "-o", str(output)])
    assert not output.exists()


def test_earlier_results_are_replaced(trained: Path, tmp_path: Path) -> None:
    source, output = picture(tmp_path / "a.jpg"), tmp_path / "out"
    predict.main([str(trained), str(source), "-o", str(output), "--network", "student"])
    student = indices(output / "masks/a.png")
    predict.main([str(trained), str(source), "-o", str(output)])
    assert not np.array_equal(indices(output / "masks/a.png"), student)


def test_photograph_lying_on_its_side_is_segmented_upright(trained: Path, tmp_path: Path) -> None:
    source = picture(tmp_path / "a.jpg", 60, 32)
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(source) as image:
        image.save(source, exif=exif)
    predict.main([str(trained), str(source), "-o", str(tmp_path / "out")])
    assert indices(tmp_path / "out" / "masks/a.png").shape == (60, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "cat,dgo"], "--labels: there is no class 'dgo' .*'dog'"),
        (["--scales", "big"], "--scales big"),
        (["--scales", "0"], "--scales 0"),
        (["--max-side=-3"], "--max-side"),
        (["--threshold", "2"], "--threshold 2"),
        (["--threshold", "0.3"], "--threshold is for"),
        (["--crf=ours", "--what=cam"], "--crf cleans segmentations"),
        (["optim.lr=1"], "override 'optim.lr=1': optim.lr belongs to the training .* what has: data.mean, "),
        (["data.root=elsewhere"], "data.root belongs"),
        (["eval.limit=3"], "eval.limit belongs"),
        (["--split", "val"], "either images, or --split"),
        (["--voc-test", "comp6"], "--split test"),
    ],
)
def test_wrong_options_are_one_line(trained: Path, tmp_path: Path, options: list[str], message: str) -> None:
    source = picture(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=message) as caught:
        predict.main([str(trained), str(source), "-o", str(tmp_path / "out"), *options])
    assert "\n" not in str(caught.value)


def test_output_that_is_a_file_is_refused(trained: Path, tmp_path: Path) -> None:
    source = picture(tmp_path / "a.jpg")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"^-o .* is a file\); give another folder$"):
        predict.main([str(trained), str(source), "-o", str(tmp_path / "taken")])


def test_description_lists_classes_by_size() -> None:
    classes = np.array([[0, 1, 1, 3], [3, 3, 0, 0]])
    assert predict.describe(classes, CLASSES) == "horse 37.5%, cat 25.0%"
    assert predict.describe(np.zeros((2, 2), np.int64), CLASSES) == "background only"


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="module")
def with_thresholds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose run had ξ and ξ†."""
    torch.set_num_threads(1)
    config = Config(model=TINY_MODEL, eval=EvalConfig(scales=(1.0,)), optim=OptimConfig(cotrain_after=0))
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
    return save_networks(path, random_network(0), random_network(1), config, thresholds=(0.4, 0.6))


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A set in VOC's layout with labels of its first image alone: a cat and a horse."""
    root = write_voc(tmp_path / "voc", block_masks())
    (root / "labels.json").write_text(json.dumps({"0": ["cat", "horse"]}))
    return root


def test_pseudo_labels_of_a_split_are_those_of_its_labels(with_thresholds: Path, voc: Path, tmp_path: Path) -> None:
    networks = load_networks(with_thresholds)
    found = {}
    for what in ("cpl", "ensemble", "cam"):
        output = tmp_path / what
        arguments = [str(with_thresholds), "--split", "val", f"data.root={voc}", "--what", what]
        assert predict.main([*arguments, "-o", str(output)]) == 0
        found[what] = output
    with Image.open(voc / "JPEGImages/0.jpg") as image:
        seen = see(networks.an, networks.config, image.convert("RGB"), torch.tensor([0, 2]))
    confidence, category = seen.strongest()
    assert np.array_equal(indices(found["cpl"] / "masks/0.png"), category * (confidence >= 0.4))
    confidence, category = strongest(seen.ensemble(), seen.present)
    assert np.array_equal(indices(found["ensemble"] / "masks/0.png"), category * (confidence >= 0.5))
    cams = arrays(found["cam"] / "cams/0.npz")
    assert cams["classes"].tolist() == [1, 3]
    np.testing.assert_allclose(cams["cam"], seen.cams[0], atol=1e-3)
    np.testing.assert_allclose(cams["cam_aux"], seen.cams[1], atol=1e-3)
    assert (found["cam"] / "overlays/0.jpg").is_file()
    assert not (found["cam"] / "masks").exists()
    record = json.loads((found["cpl"] / "scores.json").read_text())
    assert record["threshold"] == pytest.approx(0.4)
    of_cams = json.loads((found["cam"] / "scores.json").read_text())
    assert (of_cams["threshold"], of_cams["images"]) == (record["threshold"], record["images"])
    assert record["images"]["0"]["present"] == ["cat", "horse"]
    scores = torch.tensor(list(record["images"]["1"]["scores"].values()))
    assert record["images"]["1"]["present"] == [n for n, score in zip(CLASSES, scores, strict=True) if score > 0.5]
    areas = record["images"]["0"]["areas"]
    assert sum(areas.values()) == pytest.approx(1)
    assert areas["background"] == pytest.approx((indices(found["cpl"] / "masks/0.png") == 0).mean())


def test_logits_lead_to_the_segmentation(trained: Path, tmp_path: Path) -> None:
    source = picture(tmp_path / "a.jpg", 64, 48)
    predict.main([str(trained), str(source), "-o", str(tmp_path / "l"), "--what", "logits"])
    predict.main([str(trained), str(source), "-o", str(tmp_path / "s")])
    logits = arrays(tmp_path / "l/logits/a.npz")["logits"]
    assert logits.shape == (4, 48, 64)
    assert (logits.argmax(0) == indices(tmp_path / "s/masks/a.png")).mean() > 0.99
    assert not (tmp_path / "l" / "masks").exists()


def test_a_pseudo_label_needs_a_threshold(trained: Path, tmp_path: Path) -> None:
    source = picture(tmp_path / "a.jpg", 64, 48)
    with pytest.raises(UserError, match=r"no threshold ξ .*--threshold 0\.4"):
        predict.main([str(trained), str(source), "-o", str(tmp_path / "out"), "--what", "cpl"])
    assert predict.main([str(trained), str(source), "-o", str(tmp_path / "out"), "--what", "cpl", "--threshold=0"]) == 0
    predict.main(
        [str(trained), str(source), "-o", str(tmp_path / "all"), "--what=cpl", "--threshold=0", "--labels=cat"]
    )
    assert (indices(tmp_path / "all/masks/a.png") == 1).all()


def test_background_only_is_explained(
    with_thresholds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.png"
    Image.new("RGB", (64, 48), "grey").save(source)
    arguments = [str(with_thresholds), str(source), "-o", str(tmp_path / "out"), "--what=cpl"]
    predict.main([*arguments, "--threshold=1", "--labels=cat"])  # M' stays a little below 1
    out = capsys.readouterr().out
    assert "background only (the classifier's first guess: " in out
    assert "hint: background only in 1 of 1 image: no" in out


def test_cams_have_areas_at_a_named_threshold_only(
    trained: Path, with_thresholds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = picture(tmp_path / "a.jpg", 64, 48), tmp_path / "out"
    for checkpoint, options, said in (
        (trained, [], "no areas, for this checkpoint has no threshold ξ"),
        (trained, ["--threshold=0"], "areas where the CAM reaches 0, --threshold"),
        (with_thresholds, [], "areas where the CAM reaches 0.4, the checkpoint's ξ"),
    ):
        predict.main([str(checkpoint), str(source), "-o", str(output), "--what=cam", "--labels=cat", *options])
        printed = capsys.readouterr().out
        assert said in printed
        assert "CAM of cat" in printed
        assert ("%" in printed) == (not said.startswith("no areas"))
        areas = json.loads((output / "scores.json").read_text())["images"]["a"]["areas"]
        assert (areas is None) == said.startswith("no areas")


def test_no_class_and_so_no_cam_is_explained(
    with_thresholds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cosa_fast.evaluation.seeing.predicted_labels",
        lambda logits, images: torch.zeros(images, len(CLASSES), dtype=torch.bool),
    )
    source = picture(tmp_path / "a.jpg", 64, 48)
    arguments = [str(with_thresholds), str(source), "-o", str(tmp_path / "out")]
    for what, nothing in (("cam", "no class (the classifier's"), ("cpl", "background only (the classifier's")):
        predict.main([*arguments, f"--what={what}"])
        out = capsys.readouterr().out
        assert nothing in out
        hints = re.findall("^hint: .*", out, re.MULTILINE)
        assert len(hints) == 1
        assert re.search(r"1 of 1 image .* the highest score is (\w+), \d+%\. --labels \1 takes its CAM", hints[0])
    predict.main([*arguments, "--what=cam", "--labels=cat"])
    assert "hint" not in capsys.readouterr().out


def test_a_split_whose_classes_differ_is_refused(trained: Path, voc: Path, tmp_path: Path) -> None:
    (voc / "classes.txt").write_text("ape\nbee\ncow\n")
    (voc / "labels.json").write_text("{}")
    with pytest.raises(UserError, match="other classes"):
        predict.main([str(trained), "--split", "val", f"data.root={voc}", "-o", str(tmp_path / "out")])
