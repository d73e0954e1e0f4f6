"""python -m cosa_fast.evaluate: what it prints and writes, and its errors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_support import (
    CLASSES,
    MEAN,
    STD,
    TINY_MODEL,
    block_masks,
    evaluate,
    make_dataset,
    random_network,
    save_networks,
    write_voc,
)

from cosa_fast.config.schema import Config, DataConfig, EvalConfig, OptimConfig, TeacherConfig
from cosa_fast.errors import UserError
from cosa_fast.evaluate import main
from cosa_fast.evaluation.comparison import short_names


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """(checkpoint, root of its data set)."""
    root = write_voc(tmp_path / "set", block_masks())
    config = Config(
        data=DataConfig(root=str(root), mean=MEAN, std=STD),
        model=TINY_MODEL,
        eval=EvalConfig(scales=(1.0,)),
        optim=replace(OptimConfig(), cotrain_after=5),
    )
    on, an = random_network(0), random_network(1)
    return save_networks(tmp_path / "saved.pt", on, an, config, iteration=7, thresholds=(0.31, 0.43)), root


def test_evaluate_prints_both_networks_and_writes_every_figure(
    saved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, root = saved
    output = tmp_path / "new" / "figures.json"
    assert main([str(path), "eval.scales=[1.0, 0.5]", "--json", str(output), "eval.flip=false"]) == 0
    printed = capsys.readouterr().out
    assert "ON at iteration 7, 3 images of val" in printed
    assert "AN at iteration 7" in printed
    assert printed.count("free: label-free") == 1, "one legend for both"
    assert max(map(len, printed.splitlines())) <= 100
    record = json.loads(output.read_text())
    assert record["scales"] == [1.0, 0.5]
    assert record["flip"] is False
    assert record["student"]["summary"]["cam_threshold"] == pytest.approx(0.31)
    dataset = make_dataset(tmp_path / "png", block_masks())
    dataset._images = tuple(root / "JPEGImages" / f"{index}.jpg" for index in range(3))
    direct = evaluate(
        random_network(0),
        dataset,
        eval=EvalConfig(scales=(1.0, 0.5), flip=False),
        teacher=TeacherConfig(),
        thresholds=(0.31, 0.43),
    )
    assert record["student"]["summary"]["seg_label_free"] == pytest.approx(direct.label_free.miou)
    assert record["teacher"]["summary"] != record["student"]["summary"]
    assert set(record["teacher"]["per_class"]) == {"background", *CLASSES}


@pytest.mark.parametrize(("spelling", "shown"), [("teacher", "AN"), ("an", "AN"), ("student", "ON"), ("on", "ON")])
def test_evaluate_takes_a_network_a_split_and_a_limit(
    spelling: str, shown: str, saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(saved[0]), "--network", spelling, "--split", "half"]) == 0
    printed = capsys.readouterr().out
    assert f"{shown} at iteration 7, 1 image of half" in printed
    assert printed.count("at iteration") == 1
    assert main([str(saved[0]), "--network", spelling, "--limit", "2"]) == 0
    assert "2 of 3 images of val\n" in capsys.readouterr().out
    assert main([str(saved[0]), "--network", spelling, "eval.limit=2"]) == 0
    assert "2 of 3 images of val (eval.limit)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.aux_layer=-1"], "model.aux_layer belongs to the training"),
        (["eval.every=5"], "eval.every belongs to the training .* has no effect here; what has: data.root, "),
        (["log.wandb=true"], "log.wandb belongs to the training"),
        (["loss={csc: 0}"], r"override 'loss=\{csc: 0\}': loss.csc belongs to the training"),
        (["eval={scales: [1.0], every: 5}"], "eval.every belongs to the training"),
        (["eval.scale=[1.0]"], "did you mean"),
        (["eval.coexistence=[hrose]"], "hrose"),
        (["--json", "{root}"], "cannot be written"),
        (["data.root=/nowhere"], "/nowhere"),
        (["--split", ""], "--split: is empty; give a split by its name"),
        (["data.val_split=null"], r"nothing was held out of the training of .*, such as data.val_split=val$"),
    ],
)
def test_evaluate_reports_mistakes_in_one_line(saved: tuple[Path, Path], arguments: list[str], message: str) -> None:
    filled = [argument.replace("{root}", str(saved[1])) for argument in arguments]
    with pytest.raises(UserError, match=message) as caught:
        main([str(saved[0]), *filled])
    assert "\n" not in str(caught.value)


def test_json_is_checked_before_the_work(saved: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        main([str(saved[0]), "--json", str(saved[1]), "data.root=/nowhere"])


def test_a_crf_gets_its_own_column_and_its_own_figures(
    saved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = saved[0], tmp_path / "figures.json"
    options = ["--network", "an", "--crf", "ours", "--crf-side", "24", "data.workers=1", "--json", str(output)]
    assert main([str(path), *options]) == 0
    printed = capsys.readouterr().out
    assert "AN with CRF, 3 images\n" in printed
    assert "CRF ours: " in printed
    record = json.loads(output.read_text())["teacher"]
    crf = record["crf"]["summary"]
    assert {"seg_label_free", "seg_crf_ours", "crf_ours_seconds", "crf_ours_changed"} == set(crf)
    assert crf["seg_label_free"] == pytest.approx(record["summary"]["seg_label_free"])


def test_a_crf_whose_package_is_missing_is_refused_before_the_work(
    saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cosa_fast.evaluation.cleaning.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--crf pydensecrf: the package is not installed; pip install"):
        main([str(saved[0]), "--crf", "both", "data.root=/nowhere"])


def test_several_checkpoints_are_compared_in_one_table(
    saved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = saved
    state = torch.load(path, weights_only=True)
    other = tmp_path / "runs/other/checkpoints/best.pt"
    other.parent.mkdir(parents=True)
    torch.save({**state, "teacher": state["student"]}, other)
    output = tmp_path / "figures.json"
    assert main([str(path), str(other), "eval.flip=false", "--limit", "2", "--json", str(output)]) == 0
    printed = capsys.readouterr().out
    records = json.loads(output.read_text())["checkpoints"]
    assert [record["checkpoint"] for record in records] == [str(path), str(other)]
    assert records[0]["student"] == records[1]["student"] == records[1]["teacher"]
    rows = [line for line in printed.splitlines() if line.startswith(("other/best ", f"{tmp_path.name}/saved "))]
    table = [line.split() for line in rows if not line.endswith("2 of 3 images of val")][-4:]
    free = [f"{records[i][name]['summary']['seg_label_free']:.2f}" for i in (0, 1) for name in ("student", "teacher")]
    assert [row[1:3] for row in table] == [[name, figure] for name, figure in zip(("ON", "AN") * 2, free, strict=True)]
    assert printed.count("free: label-free") == 1, "one legend for all"
    assert "not the same images" not in printed
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 100


def test_a_checkpoint_that_cannot_be_read_is_told_before_another_is_evaluated(
    saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pt: no such file"):
        main([str(saved[0]), "nowhere.pt"])
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/checkpoints/best.pt", "runs/b/checkpoints/best.pt"], ["a/best", "b/best"]),
        (["x/a/checkpoints/best.pt", "y/a/checkpoints/best.pt"], ["x/a/best", "y/a/best"]),
        (["a.pt", "a.pt"], ["a", "a"]),
        (["/deit.pth", "/runs/a/checkpoints/00000300.pt"], ["deit", "a/00000300"]),
    ],
)
def test_checkpoints_get_the_shortest_names_that_tell_them_apart(paths: list[str], names: list[str]) -> None:
    assert short_names(paths) == names
