"""Ablation files: what they mean, and what is wrong with them in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.runs.matrix import SHIPPED, load_matrix
from cosa_fast.config.parsing import load_config
from cosa_fast.errors import UserError

GOOD = "base: demo.yaml\noverrides: [optim.iterations=9, optim.cotrain_after=3]\nseeds: [4, 1]\n"
ROWS = "runs:\n  paper:\n  csc_off: [loss.csc=0]\n"

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_every_row_meets_every_seed(write: Write) -> None:
    matrix = load_matrix(write(GOOD + ROWS), "out")
    assert [str(run) for run in matrix.runs] == [
        "paper, seed 4", "csc_off, seed 4", "paper, seed 1", "csc_off, seed 1",
    ]  # fmt: skip
    paper, csc_off = matrix.runs[:2]
    assert (paper.config.optim.iterations, paper.config.loss.csc, paper.config.run.seed) == (9, 0.1, 4)
    assert csc_off.config.loss.csc == 0
    assert str(csc_off.folder.path) == "out/csc_off_4"
    assert csc_off.settings == (
        "demo.yaml", "optim.iterations=9", "optim.cotrain_after=3", "loss.csc=0",
        "run.output=out", "run.name=csc_off_4", "run.seed=4",
    )  # fmt: skip
    assert load_matrix(write(GOOD + ROWS)).runs[0].config.run.output == "runs/mine"


def test_the_command_line_s_overrides_come_before_the_rows_own(write: Write) -> None:
    matrix = load_matrix(write(GOOD + ROWS), base="coco.yaml", overrides=["optim.iterations=8", "loss.csc=0.7"])
    paper, csc_off = matrix.runs[:2]
    assert paper.config.data.format == "coco"
    assert (paper.config.optim.iterations, paper.config.loss.csc, csc_off.config.loss.csc) == (8, 0.7, 0.0)
    assert matrix.overrides[-1] == "loss.csc=0.7"


def test_the_base_is_found_beside_the_file(write: Write, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("base: voc.yaml\noptim: {batch_size: 3}\n")
    (run,) = load_matrix(write("base: small.yaml\nseeds: [0]\nruns: {one: }\n")).runs
    assert run.config.optim.batch_size == 3
    assert run.settings[0] == str(tmp_path / "small.yaml")


def test_a_file_can_be_like_another(write: Write, tmp_path: Path) -> None:
    """Its base is looked up beside it, its overrides come first, its seeds serve both."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "small.yaml").write_text("base: voc.yaml\noptim: {batch_size: 3}\n")
    setting = tmp_path / "set" / "setting.yaml"
    setting.write_text("base: small.yaml\noverrides: [optim.lr=1, loss.csc=0.3]\nseeds: [7]\nruns: {unused: }\n")
    by_key = load_matrix(write("like: set/setting.yaml\noverrides: [loss.csc=0.4]\nruns: {one: }\n"))
    by_option = load_matrix(
        write("base: demo.yaml\nseeds: [0, 1]\noverrides: [loss.csc=0.4]\nruns: {one: }\n"), like=str(setting)
    )
    for matrix in (by_key, by_option):
        (run,) = matrix.runs
        assert (run.row, run.seed) == ("one", 7)
        assert (run.config.optim.batch_size, run.config.optim.lr, run.config.loss.csc) == (3, 1.0, 0.4)
    assert (by_key.runs[0].config.run.output, by_option.runs[0].config.run.output) == (
        "runs/mine", "runs/mine_setting",
    )  # fmt: skip
    own = load_matrix(write("like: set/setting.yaml\nbase: demo.yaml\nseeds: [5]\nruns: {one: }\n"))
    assert (own.seeds, own.base) == ((5,), "demo.yaml")
    with pytest.raises(UserError, match=r"mine.yaml: is like set/setting.yaml itself"):
        load_matrix("fig1.yaml", like=write("like: set/setting.yaml\nruns: {one: }\n"))


def test_environment_variables_are_filled_in_and_kept_out_of_what_is_reported(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "base: voc.yaml\noverrides:\n  - data.root=${WHERE}/set\nseeds: [0]\nruns: {one: }\n"
    monkeypatch.setenv("WHERE", "/disk")
    matrix = load_matrix(write(text))
    assert matrix.runs[0].config.data.root == "/disk/set"
    assert matrix.overrides == ("data.root=${WHERE}/set",)
    monkeypatch.delenv("WHERE")
    with pytest.raises(UserError, match=r"overrides: 'data.root=\$.*no environment variable WHERE; export WHERE="):
        load_matrix(write(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: [0]\n" + GOOD + ROWS, r"mine.yaml: unknown key seed \(did you mean 'seeds'\?\)"),
        (GOOD, "mine.yaml: runs is missing; docs/ablations.md shows the format"),
        ("seeds: [0]\n" + ROWS, "mine.yaml: base is missing"),
        ("base: nowhere.yaml\nseeds: [0]\n" + ROWS, "nowhere.yaml: no such file, nor one of the shipped ones"),
        ("like: tabel3.yaml\nseeds: [0]\n" + ROWS, r"tabel3.yaml: no such file \(did you mean 'table3.yaml'\?\), nor"),
        ("base: demo.yaml\nseeds: 3\n" + ROWS, r"seeds = 3 must be a list of whole numbers, for example \[0, 1, 2\]"),
        ("base: demo.yaml\nseeds: [1, 1]\n" + ROWS, r"seeds = \[1, 1\] names one twice"),
        (GOOD + "runs:\n  a: [loss.cscc=0]\n", r"runs.a: override 'loss.cscc=0': unknown key .*mean 'loss.csc'\?"),
        (GOOD + "runs:\n  a: loss.csc=0\n", "runs.a = 'loss.csc=0' must be a list of key=value"),
        (GOOD + "runs:\n  a: [run.seed=3]\n", "runs.a: override 'run.seed=3': run.seed is set by seeds"),
        (GOOD + "runs:\n  a:\n  - 'run={seed: 3}'\n", "runs.a: override 'run={seed: 3}': run.seed is set by seeds"),
        (GOOD + "runs:\n  a:\n  a: [loss.csc=0]\n", "mine.yaml: not valid YAML: the key 'a' comes twice"),
        (GOOD + "runs: " + "[" * 3000, "mine.yaml: not valid YAML: maximum recursion depth"),
        (GOOD + "runs: {a: [2020-99-99]}", "mine.yaml: not valid YAML: month must be in 1..12"),
        ("base: demo.yaml\nseeds: 0\n" + ROWS, "seeds = 0 must be a list of whole numbers"),
        ("base: demo.yaml\nseeds: [1:30]\n" + ROWS, r"seeds = \['1:30'\] must be a list of whole numbers"),
        ("like:\n" + GOOD + ROWS, "mine.yaml: like = None must be the name of an ablation file"),
        (GOOD + "runs:\n  off: [loss.csc=0]\n", "runs: the name False is no text to YAML; put it in quotes"),
        (GOOD + "runs:\n  a/b: []\n", "runs: 'a/b' also names a folder"),
        (GOOD + "runs: [a]\n", r"runs = \['a'\] must be names with lists of overrides"),
        ("- base\n", "must be a mapping with the keys like, base, overrides, seeds, runs"),
        (GOOD + "runs: {a: [x=[1.0]]\n", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_one_line(text: str, said: str, write: Write) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_matrix(write(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["1", "0x1", "off"])
def test_names_and_folders_are_texts_whatever_yaml_makes_of_them(text: str, write: Write) -> None:
    matrix = load_matrix(write(GOOD + f"runs: {{'{text}': }}"), f"{text} #a: b")
    assert str(matrix.runs[0].folder.path) == f"{text} #a: b/{text}_4"
    (source, *settings) = matrix.runs[0].settings
    assert load_config(source, settings) == matrix.runs[0].config


@pytest.mark.parametrize("option", ["output", "base", "like"])
def test_an_empty_option_is_not_taken_for_none(option: str, write: Write) -> None:
    with pytest.raises(UserError):
        load_matrix(write(GOOD + ROWS), **{option: ""})


def test_an_unknown_file_names_the_shipped_ones() -> None:
    with pytest.raises(UserError, match=r"table5.yaml: no such file.*animals.yaml, .*table4.yaml"):
        load_matrix("table5.yaml")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_rows_of_a_shipped_matrix_differ(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSA_SHARED", "/shared")
    matrix = load_matrix(path.name)
    assert matrix.seeds == (0, 1, 2)
    first: dict[str, Any] = {}
    for run in matrix.runs[: len(matrix.rows)]:
        config = run.config
        learned = str((config.data, config.model, config.teacher, config.threshold, config.loss, config.optim))
        assert learned not in first, f"{run.row} is {first.get(learned)} once more"
        first[learned] = run.row
