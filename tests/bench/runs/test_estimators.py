"""Threshold estimators: what each finds where the answer is known, and the whole comparison on a tiny run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_run import MakeConfig

from bench import thresholds
from bench.runs.estimators import BINS, ESTIMATORS, MAPS, otsu, posterior, shared_variance
from cosa_fast.config.parsing import config_to_dict
from cosa_fast.errors import UserError
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.training import train


def histograms(values: np.ndarray) -> dict[str, list[float]]:
    counts = {
        f"{grid}_{power}": np.histogram(values ** (1 / power), BINS, (0, 1))[0].astype(float).tolist()
        for grid in ("token", "pixel")
        for power in (1, 2)
    }
    return counts


def peaks(low: float, high: float, power: int = 1) -> np.ndarray:
    """Two normal peaks of equal mass and width 0.05, raised to a power."""
    generator = np.random.default_rng(0)
    values = np.concatenate(
        [low + 0.05 * generator.standard_normal(50_000), high + 0.05 * generator.standard_normal(50_000)]
    )
    return np.clip(values, 0, 1) ** power


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if "roots" not in name])
def test_equal_peaks_are_parted_in_the_middle(name: str) -> None:
    # Otsu's criterion is flat across the gap: anything in it will do.
    assert ESTIMATORS[name](histograms(peaks(0.3, 0.8))) == pytest.approx(0.55, abs=0.1 if "Otsu" in name else 0.015)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if "roots" in name])
def test_on_the_roots_the_middle_is_that_of_the_roots(name: str) -> None:
    assert ESTIMATORS[name](histograms(peaks(0.4, 0.8, power=2))) == pytest.approx(0.36, abs=0.015)


def test_one_bin_has_no_border() -> None:
    counts = np.zeros(BINS)
    counts[100] = 1000
    assert posterior(counts, 0.05) is None
    assert otsu(counts, 0.05) is not None  # an argmax is always somewhere


def test_shared_variance_against_the_closed_form() -> None:
    """Peaks of unequal mass: the border moves from the middle by s² log(w0 / w1) / (m1 - m0)."""
    generator = np.random.default_rng(0)
    values = np.concatenate(
        [0.3 + 0.1 * generator.standard_normal(90_000), 0.7 + 0.1 * generator.standard_normal(10_000)]
    )
    counts = np.histogram(values, BINS, (0, 1))[0].astype(float)
    assert shared_variance(counts, 0.0) == pytest.approx(0.5 + 0.01 * np.log(9) / 0.4, abs=0.01)


def test_a_run_is_compared_checkpoint_by_checkpoint(make_config: MakeConfig, tmp_path: Path) -> None:
    summary = train(make_config("run.checkpoint_every=3"))
    out = tmp_path / "thresholds.json"
    assert thresholds.main([str(summary.directory), "--images", "2", "--out", str(out)]) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert [row["iteration"] for row in written["rows"]] == [3, 6]
    for row in written["rows"]:
        for name in MAPS:
            assert row[name]["miou"][round(row[name]["best_threshold"] / 0.02) - 1] == row[name]["best_miou"]
            assert all(loss is None or loss >= 0 for loss in row[name]["loss"].values())
            pixels, tokens = (sum(row[name]["histograms"][f"{grid}_1"]) for grid in ("pixel", "token"))
            assert (pixels, tokens) == (2 * 64 * 64, 2 * 8 * 8)


def test_what_cannot_be_compared_is_said_before_the_work_on_others(
    make_config: MakeConfig, make_standalone: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(make_config("optim.iterations=1", "optim.cotrain_after=1")).folder
    standalone = RunFolder.of(make_standalone("run.name=standalone"))
    standalone.path.mkdir()
    standalone.config.write_text(yaml.safe_dump(config_to_dict(make_standalone())))
    capsys.readouterr()
    for arguments, said in {
        ("nowhere",): r"nowhere: no run \(it lacks config.yaml\)",
        (str(standalone.path),): "standalone: DeepLabV3Plus has no CAM, and no threshold; give a run of CoSA",
        ("--from-iteration", "2"): "no checkpoint from iteration 2 on; lower --from-iteration",
    }.items():
        with pytest.raises(UserError, match=said):
            thresholds.main([str(run.path), *arguments])
    assert capsys.readouterr().out == ""
    classes = Path(yaml.safe_load(run.config.read_text())["data"]["root"]) / "classes.txt"
    moved = run.config.read_text().replace(str(classes.parent), str(run.path / "set"))
    shutil.copytree(classes.parent, run.path / "set")
    (run.path / "set" / "classes.txt").write_text("\n".join(classes.read_text().split()[::-1]) + "\n")
    run.config.write_text(moved)
    with pytest.raises(UserError, match="the evaluation set has the classes plasma, "):
        thresholds.main([str(run.path)])


def test_without_an_auxiliary_head_there_is_one_map(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("model.aux_layer=null", "optim.iterations=1", "optim.cotrain_after=1", "run.name=one")
    summary = train(make_config(*settings))
    out = tmp_path / "thresholds.json"
    assert thresholds.main([str(summary.directory), "--images", "1", "--out", str(out)]) == 0
    assert {tuple(loss) for loss in json.loads(out.read_text())["mean_losses"].values()} == {("cam",)}
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "-"
