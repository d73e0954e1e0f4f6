"""python -m cosa_fast.predict: what is written, what is never touched, and what happens when something is wrong."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_support import CLASSES, TINY_MODEL, picture, random_network, save_networks
from PIL import Image

from cosa_fast import cli, predict
from cosa_fast.config.schema import Config, DataConfig, EvalConfig
from cosa_fast.data_pipeline.views.pixels import normalise
from cosa_fast.errors import UserError
from cosa_fast.evaluation.inference import segment
from cosa_fast.evaluation.networks import load_networks


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
        pixels = normalise(image.convert("RGB"), networks.config.data.mean, networks.config.data.std)
    expected = segment(networks.an, pixels, (70, 100), (1.0, 0.5), flip=True).numpy()
    assert len(np.unique(expected)) > 1
    assert np.array_equal(indices(output / "a.png"), expected)
    with Image.open(output / "a_overlay.jpg") as image:
        assert image.size == (100, 70)


def test_network_and_scales_are_those_asked_for(trained: Path, tmp_path: Path) -> None:
    source = picture(tmp_path / "a.jpg", 64, 64)
    results = []
    options = ([], ["--network", "on"], ["--scales", "[1.5,2]"], ["--network", "teacher"], ["--network", "student"])
    for number, each in enumerate(options):
        output = tmp_path / str(number)
        predict.main([str(trained), str(source), "-o", str(output), *each])
        results.append(indices(output / "a.png"))
    assert not np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    assert np.array_equal(results[0], results[3])
    assert np.array_equal(results[1], results[4])


def test_labels_limit_what_may_be_predicted(trained: Path, tmp_path: Path) -> None:
    source = picture(tmp_path / "a.jpg", 64, 64)
    free, aware = tmp_path / "free", tmp_path / "aware"
    predict.main([str(trained), str(source), "-o", str(free)])
    missing = next(index for index in (1, 2, 3) if (indices(free / "a.png") == index).any())
    others = [name for index, name in enumerate(CLASSES, start=1) if index != missing]
    predict.main([str(trained), str(source), "-o", str(aware), "--labels", ", ".join(others)])
    assert not (indices(aware / "a.png") == missing).any()


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
    names = sorted(path.name for path in output.iterdir())
    assert names == ["a.png", "a_overlay.jpg", "b.png", "b_overlay.jpg", "c.png", "c_overlay.jpg"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert all(any(str(output / name) in line for line in printed) for name in ("a.png", "b.png", "c.png"))


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
    assert sorted(path.name for path in output.glob("*.png")) == ["a.png", "c.png"]
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
    assert sorted(path.name for path in clean.glob("*.png")) == ["a.png", "c.png"]
    assert not np.array_equal(indices(plain / "a.png"), indices(clean / "a.png"))
    assert capsys.readouterr().out.count("(CRF ") == 2


def test_inputs_are_never_overwritten(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    source = picture(folder / "a.png")
    before = source.read_bytes()
    with pytest.raises(UserError, match="would be overwritten"):
        predict.main([str(trained), str(source), "-o", str(folder)])
    assert source.read_bytes() == before
    jpeg = picture(folder / "b.jpg")
    os.link(jpeg, folder / "b.png")  # another name of the same input
    with pytest.raises(UserError, match="would be overwritten"):
        predict.main([str(trained), str(jpeg), "-o", str(folder)])


def test_result_of_one_image_that_is_another_input_is_refused(trained: Path, tmp_path: Path) -> None:
    first, second = picture(tmp_path / "a.jpg"), picture(tmp_path / "a_overlay.jpg")
    with pytest.raises(UserError, match=r"a_overlay\.jpg is an input"):
        predict.main([str(trained), str(first), str(second), "-o", str(tmp_path)])


def test_two_images_of_one_name_are_refused_before_anything_is_written(trained: Path, tmp_path: Path) -> None:
    first, second = picture(tmp_path / "x" / "a.jpg"), picture(tmp_path / "y" / "a.png")
    output = tmp_path / "out"
    with pytest.raises(UserError, match="two folders"):
        predict.main([str(trained), str(first), str(second), "-o", str(output)])
    assert not output.exists()


def test_earlier_results_are_replaced(trained: Path, tmp_path: Path) -> None:
    source, output = picture(tmp_path / "a.jpg"), tmp_path / "out"
    predict.main([str(trained), str(source), "-o", str(output), "--network", "student"])
    student = indices(output / "a.png")
    predict.main([str(trained), str(source), "-o", str(output)])
    assert not np.array_equal(indices(output / "a.png"), student)


def test_photograph_lying_on_its_side_is_segmented_upright(trained: Path, tmp_path: Path) -> None:
    source = picture(tmp_path / "a.jpg", 60, 32)
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(source) as image:
        image.save(source, exif=exif)
    predict.main([str(trained), str(source), "-o", str(tmp_path / "out")])
    assert indices(tmp_path / "out" / "a.png").shape == (60, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "cat,dgo"], "--labels: there is no class 'dgo' .*'dog'"),
        (["--scales", "big"], "--scales big"),
        (["--scales", "0"], "--scales 0"),
        (["--max-side", "-3"], "--max-side"),
    ],
)
def test_wrong_options_are_one_line(trained: Path, tmp_path: Path, options: list[str], message: str) -> None:
    source = picture(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=message) as caught:
        predict.main([str(trained), str(source), "-o", str(tmp_path / "out"), *[f"{options[0]}={options[1]}"]])
    assert "\n" not in str(caught.value)


def test_output_that_is_a_file_is_refused(trained: Path, tmp_path: Path) -> None:
    source = picture(tmp_path / "a.jpg")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="cannot make this folder"):
        predict.main([str(trained), str(source), "-o", str(tmp_path / "taken")])


def test_description_lists_classes_by_size() -> None:
    classes = np.array([[0, 1, 1, 3], [3, 3, 0, 0]])
    assert predict.describe(classes, CLASSES) == "horse 37.5%, cat 25.0%"
    assert predict.describe(np.zeros((2, 2), np.int64), CLASSES) == "background only"
