"""What the loop says of an evaluation, and which checkpoint it calls the best."""

from collections.abc import Callable

import pytest

from cosa_fast import evaluate
from cosa_fast.config.schema import Config
from cosa_fast.evaluation.networks import load
from cosa_fast.run.evaluating import headline
from cosa_fast.run.log import read_log
from cosa_fast.run.training import train


def test_a_line_says_how_far_the_thresholds_are_from_the_best() -> None:
    summary = {
        "seg_label_free": 43.64, "seg_label_aware": 47.7, "cam_best": 52.5, "cam_threshold_loss": 1.94,
        "cam_aux_threshold_loss": -0.26, "foreground_share_cam": 0.441, "foreground_share_true": 0.34,
    }  # fmt: skip
    assert headline(summary) == (
        "seg label-free 43.6  seg label-aware 47.7  CAM at best threshold 52.5  at ξ 1.9 less  CAM† at ξ† 0.3 more  "
        "foreground 44% (truth 34%)"
    )
    before = {"seg_label_free": 3.0, "cam_best": 44.6, "foreground_share_true": 0.34}
    assert headline(before) == "seg label-free 3.0  CAM at best threshold 44.6"


@pytest.mark.parametrize("select", ["label-free", "label-aware", "none"])
def test_best_pt_says_by_what_and_on_which_images_it_was_chosen(
    select: str, make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(f"eval.select={select}", "eval.every=2", "optim.iterations=4", "optim.cotrain_after=2")
    summary = train(config)
    chosen = load(summary.folder.best)["chosen"]
    if select == "none":
        assert (chosen, load(summary.folder.best)["iteration"]) == ({"by": "none"}, 4), "the last is the best"
        return
    names = {"label-free": ["teacher"], "label-aware": ["teacher", "student"]}[select]
    figure = f"seg_{select.replace('-', '_')}"
    figures = {key: summary.results[{"teacher": "an", "student": "on"}[key]].summary()[figure] for key in names}
    assert chosen == {
        "by": figure,
        "of": max(names, key=lambda name: figures[name]),
        "value": pytest.approx(max(figures.values())),
        "on": "val",
        "images": 2,
        "identity": summary.results["an"].identity,
    }
    records = read_log(summary.folder.log)
    wanted = summary.results["an"].evaluated_on("val")
    assert [each["evaluated_on"] for each in records if each["kind"].startswith("eval_")] == [wanted] * 4
    capsys.readouterr()
    evaluate.main([str(summary.folder.best), "--network", "an"])
    assert f"chosen by {figure} = {chosen['value']:.2f} on 2 images of val" in capsys.readouterr().out


@pytest.mark.parametrize(("select", "seen"), [("label-free", [4]), ("label-aware", [2, 4])])
def test_an_alone_is_evaluated_until_the_end(select: str, seen: list[int], make_config: Callable[..., Config]) -> None:
    overrides = ("eval.networks=teacher", "eval.every=2", "optim.iterations=4", "optim.cotrain_after=2")
    summary = train(make_config(f"eval.select={select}", *overrides))
    records = read_log(summary.folder.log)
    iterations = {
        kind: [record["iteration"] for record in records if record["kind"] == f"eval_{kind}"]
        for kind in ("student", "teacher")
    }
    assert iterations == {"student": seen, "teacher": [2, 4]}
    assert list(summary.results) == ["on", "an"]
