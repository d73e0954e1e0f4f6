"""Errors as the user of the command line meets them, in processes of their own where that is the point."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cosa_fast.cli import run_cli
from cosa_fast.errors import UserError
from cosa_fast.train import main

REPOSITORY = Path(__file__).resolve().parents[1]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m cosa_fast.train ARGUMENTS` in a folder that is not the repository."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "cosa_fast.train", *arguments]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """run(*arguments): (exit status, stderr) of training's command line in an empty folder."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        return run_cli(main), capsys.readouterr().err

    return call


def fail(argv: list[str]) -> int:
    raise UserError("data.root: gone; set data.root=...")


def test_user_error_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["anything"])
    assert run_cli(fail) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: data.root: gone; set data.root=...\n"
    assert captured.out == ""


def test_debug_shows_the_traceback_and_stays_out_of_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["anything", "a", "--debug", "b=1"])
    assert run_cli(lambda argv: 7 if argv == ["a", "b=1"] else 0) == 7
    with pytest.raises(UserError, match="gone"):
        run_cli(fail)


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["anything"])
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda argv: 1 // 0)


def test_voc_without_its_images_on_the_real_command_line(tmp_path: Path) -> None:
    """One line: where it looked, which archive to fetch, and what to try without it."""
    result = command("voc.yaml", cwd=tmp_path)

    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for part in ("data/VOCdevkit/VOC2012", "VOCtrainval_11-May-2012.tar", "demo.yaml", "data.root="):
        assert part in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.batchsize=8", ("optim.batchsize", "batch_size")),
        ("optimiser.lr=1", ("optimiser", "optim")),
        ("optim.lr=fast", ("optim.lr", "fast")),
        ("optim.lr=-1", ("optim.lr", "-1")),
        ("loss.guidance=oracle", ("loss.guidance", "oracle", "truth")),
        ("teacher.momentum=1.5", ("teacher.momentum", "1.5")),
        ("optim.lr", ("optim.lr", "key=value")),
        ("optim.cotrain_after=99999", ("optim.cotrain_after", "99999")),
        ("threshold.mode=band", ("threshold.mode", "loss.csc=0")),
    ],
)
def test_a_bad_override_is_one_line_that_names_it(
    override: str, parts: tuple[str, ...], run: Callable[..., tuple[int, str]]
) -> None:
    status, errors = run("voc.yaml", override)

    assert status == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert all(part in errors for part in parts)


def test_an_unknown_configuration_lists_the_shipped_ones(run: Callable[..., tuple[int, str]]) -> None:
    status, errors = run("vok.yaml")
    assert status == 2
    assert errors.count("\n") == 1
    assert "voc.yaml" in errors


def test_a_missing_checkpoint_is_one_line(run: Callable[..., tuple[int, str]]) -> None:
    status, errors = run("voc.yaml", "--resume", "nowhere.pt")
    assert (status, errors.count("\n")) == (2, 1)
    assert "nowhere.pt" in errors


DOORS = ("train", "evaluate", "predict", "prepare", "report.__main__", "export", "demo")


@pytest.mark.parametrize("door", DOORS)
def test_a_misspelt_option_is_one_line_with_the_nearest(door: str) -> None:
    """Told before the required ones, of which it may be meant to be one."""
    with pytest.raises(UserError, match=r"^unknown option --debgu \(did you mean '--debug'\?\); all options: .*--help"):
        importlib.import_module(f"cosa_fast.{door}").main(["--debgu=1"])


@pytest.mark.parametrize(
    ("door", "words", "message"),
    [
        ("export", "x.pt --format onxn", r"^--format: 'onxn' is none of safetensors.*\(did you mean 'onnx'\?\); all"),
        ("prepare", "fodler --root .", r"^FORMAT: 'fodler' is none of voc.*\(did you mean 'folder'\?\)"),
        ("predict", "x.pt a.jpg -o out --what sgementation", "did you mean 'segmentation'"),
        ("predict", "x.pt a.jpg", "^the following arguments are required: -o/--output; all options"),
        ("predict", "x.pt a.jpg -o out --max-side 1e3", "^--max-side: '1e3' is no whole number from 16 up"),
        ("evaluate", "x.pt --limit 0", "^--limit: '0' is no whole number from 1 up"),
        ("evaluate", "x.pt --network", "^--network: expected one argument"),
        ("prepare", "voc --root . --workers many", "^--workers: 'many' is no whole number"),
        ("train", "voc.yaml --data.root=x", "settings are written without dashes, data.root=x$"),
        ("train", "voc.yaml -resume auto", "^unknown option -resume .did you mean '--resume'"),
        ("train", "--overwrite", "^the following arguments are required: config; all options"),
        ("export", "x.pt y.pt", "^unrecognized arguments: y.pt; all options"),
        ("train", "data.root=x", "data.root=x: is a setting; the configuration comes before it"),
        ("train", "foldre.yaml", r"no such file \(did you mean 'folder.yaml'\?\), nor"),
        (
            "evaluate",
            "x.pt --crf-side 64",
            "^--crf-side: has no effect without --crf; add that, or leave",
        ),
        ("predict", "x.pt a.jpg -o out --crf-si=64", "^--crf-side: has no effect without --crf; add"),
        ("export", "x.pt --private", "^--private: has no effect without --push-to-hub; add"),
        (
            "evaluate",
            "x.pt --split val data.val_split=test",
            r"^--split and data.val_split=\.\.\. are one setting",
        ),
        ("evaluate", "eval.limit=3 x.pt --limit 2", r"^--limit and eval.limit=\.\.\. are one setting"),
        ("evaluate", 'eval={"limit":3} x.pt --limit 2', r"^--limit and eval.limit=\.\.\. are one setting"),
        (
            "predict",
            "x.pt a.jpg -o out eval.scales=[1] --scales 2",
            r"^--scales and eval.scales=\.\.\. are one",
        ),
        ("prepare", "voc --download --root . --pack", "^--split: which list of the voc set"),
        ("prepare", "sbd --download --root . --workers 2", "^--split: which list of the sbd set"),
        ("prepare", "voc --download --root . --split val --make-list", "^--make-list: makes the list train_aug of the"),
        ("prepare", "voc --download --root . --split val --pack x.zip", "^--pack x.zip: a pack is a tar; choose"),
        ("prepare", "voc --root . --split train --labels a.csv --from xml", "^--labels a.csv and --from xml: which"),
        ("train", ".", "is a folder; images of your own are trained on with folder.yaml data.root="),
    ],
)
def test_wrong_arguments_are_one_line(door: str, words: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        importlib.import_module(f"cosa_fast.{door}").main(words.split())
    assert "\n" not in str(caught.value)


def test_options_may_stand_anywhere(run: Callable[..., tuple[int, str]]) -> None:
    """Overrides before and after options."""
    status, errors = run("voc.yaml", "optim.lr=1e-4", "--overwrite", "data.root=elsewhere")
    assert status == 2
    assert "elsewhere" in errors


@pytest.mark.parametrize(
    ("door", "words"),
    [
        ("evaluate", "x.pt --json {}"),
        ("predict", "x.pt a.jpg -o {}"),
        ("export", "x.pt -o {}"),
        ("report.__main__", "runs -o {}"),
        ("prepare", "folder --root . -o {}"),
        ("prepare", "voc --download --root . --split train --pack {}.tar"),
    ],
)
def test_the_place_of_an_output_is_looked_at_before_anything_else(
    door: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is made meanwhile."""
    monkeypatch.chdir(tmp_path)
    Path("afile").write_text("mine")
    with pytest.raises(UserError, match=r"^-\S+ afile/x\S*: cannot be written \(afile is a file\); give another f"):
        importlib.import_module(f"cosa_fast.{door}").main(words.format("afile/x").split())
    assert [path.name for path in tmp_path.iterdir()] == ["afile"]


def test_images_are_not_generated_in_the_place_of_voc(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    status, errors = run("voc.yaml", "data.format=synthetic")
    assert (status, errors.count("\n")) == (2, 1)
    assert "data.root=data/demo" in errors
    assert list(tmp_path.iterdir()) == []
