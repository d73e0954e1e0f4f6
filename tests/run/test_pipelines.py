"""Which pipeline a run uses: what data.pipeline means, that a resumed run keeps it, and that the run says so."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError
from cosa_fast.evaluation.networks import load
from cosa_fast.run.data import choose_pipeline, open_datasets, open_pipeline
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.training import train

CPU = torch.device("cpu")
Same = Callable[[Any, Any], bool]
MakeConfig = Callable[..., Config]


@pytest.fixture
def dali() -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra [dali])")


@pytest.fixture
def no_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cosa_fast.data_pipeline.dali.feed", None)


def manifest_of(config: Config) -> dict[str, Any]:
    return json.loads(RunFolder.of(config).manifest.read_text(encoding="utf-8"))


def checkpoint_of(config: Config, iteration: int) -> dict[str, Any]:
    state = load(RunFolder.of(config).checkpoint(iteration))
    return {key: value for key, value in state.items() if key != "config"}


@pytest.mark.usefixtures("dali")
def test_auto_takes_dali_where_it_works(make_config: MakeConfig) -> None:
    assert choose_pipeline(make_config("data.pipeline=auto"), CPU)[0] == "dali"
    assert choose_pipeline(make_config("data.pipeline=dali"), CPU)[0] == "dali"
    assert choose_pipeline(make_config("data.pipeline=torch"), CPU)[0] == "torch"


@pytest.mark.usefixtures("no_dali")
def test_without_dali_auto_falls_back_and_says_why(make_config: MakeConfig) -> None:
    pipeline, reason = choose_pipeline(make_config("data.pipeline=auto"), CPU)
    assert pipeline == "torch"
    assert "nvidia-dali-cuda130" in reason
    with pytest.raises(UserError) as caught:
        choose_pipeline(make_config("data.pipeline=dali"), CPU)
    for part in ("data.pipeline = dali", "nvidia-dali-cuda130", '[dali]"', "data.pipeline=torch"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("dali")
@pytest.mark.skipif(torch.cuda.is_available(), reason="DALI works on CUDA here")
def test_a_device_on_which_dali_does_not_work_is_named(make_config: MakeConfig) -> None:
    pipeline, reason = choose_pipeline(make_config("data.pipeline=auto"), torch.device("cuda", 0))
    assert pipeline == "torch"
    assert "cuda:0" in reason
    assert "\n" not in reason


@pytest.mark.usefixtures("dali")
def test_a_resumed_run_keeps_its_pipeline_under_auto(make_config: MakeConfig) -> None:
    assert choose_pipeline(make_config("data.pipeline=auto"), CPU, before="torch")[0] == "torch"
    assert choose_pipeline(make_config("data.pipeline=auto"), CPU, before="dali")[0] == "dali"


@pytest.mark.usefixtures("dali")
def test_a_run_with_dali_resumes_bit_for_bit(
    make_config: MakeConfig, same: Same, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("data.pipeline=auto", "run.checkpoint_every=1", "optim.iterations=4", "optim.cotrain_after=2")
    straight, broken = make_config(*overrides), make_config(*overrides, "run.name=broken")
    train(straight)
    assert "pipeline  dali (it works on cpu)" in capsys.readouterr().out
    assert manifest_of(straight)["pipeline"] == "dali"
    source, target = RunFolder.of(straight), RunFolder.of(broken)
    target.best.parent.mkdir(parents=True)
    for number in (1, 2):
        shutil.copy(source.checkpoint(number), target.checkpoint(number))
    train(broken, resume="auto")
    assert same(checkpoint_of(broken, 4), checkpoint_of(straight, 4))
    assert "warning" not in capsys.readouterr().out


@pytest.mark.usefixtures("dali")
def test_a_change_of_the_pipeline_is_announced(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_config("optim.iterations=1", "optim.cotrain_after=1"))
    config = make_config("data.pipeline=dali", "optim.iterations=2", "optim.cotrain_after=1")
    train(config, resume="auto")
    said = capsys.readouterr().out
    assert "has used the torch pipeline so far" in said
    assert manifest_of(config)["pipeline"] == "dali"
    assert manifest_of(config)["before"][0]["pipeline"] == "torch"


@pytest.mark.usefixtures("dali")
def test_losses_of_both_pipelines_are_close(make_config: MakeConfig) -> None:
    curves = []
    for name in ("torch", "dali"):
        config = make_config(f"data.pipeline={name}", f"run.name={name}", "optim.iterations=4", "optim.cotrain_after=2")
        directory = train(config).directory
        lines = [json.loads(line) for line in (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        curves.append([line["loss"] for line in lines if line["kind"] == "train"])
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], rel=0.05)


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_a_run_can_go_on_without_a_bad_image(
    pipeline: str, make_config: MakeConfig, data_root: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if pipeline == "dali":
        request.getfixturevalue("dali")
    root = tmp_path / "set"
    shutil.copytree(data_root, root)
    bad = sorted((root / "JPEGImages").glob("train*.jpg"))[2]
    bad.write_bytes(bad.read_bytes()[:-50])
    with pytest.raises(UserError, match=bad.name):
        train(make_config(f"data.root={root}", f"data.pipeline={pipeline}", "run.name=stopped"))
    # Four batches of two: every image once.
    config = make_config(f"data.root={root}", f"data.pipeline={pipeline}", "data.unreadable=skip", "optim.iterations=4")
    assert train(config).iteration == config.optim.iterations


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_settings_reach_the_pipeline(pipeline: str, make_config: MakeConfig, request: pytest.FixtureRequest) -> None:
    if pipeline == "dali":
        request.getfixturevalue("dali")
    config = make_config("data.workers=2", "data.prefetch=3", "loss.guidance=truth", "optim.batch_size=4")
    dataset, _ = open_datasets(config)
    batch = next(iter(open_pipeline(config, dataset, CPU, pipeline, start=4, rank=1, ranks=2)))  # type: ignore[arg-type]
    whole = next(iter(open_pipeline(config, dataset, CPU, pipeline, start=4)))  # type: ignore[arg-type]
    assert batch.ids == whole.ids[2:]
    assert batch.truth is not None
    assert whole.truth is not None
    assert torch.equal(batch.truth, whole.truth[2:])
