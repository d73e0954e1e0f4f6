"""The four verbs of a notebook: the same as the command lines, with results in place of text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from evaluation_support import picture
from PIL import Image
from tiny_run import MakeConfig

from cosa_fast import api
from cosa_fast.config.parsing import config_to_dict
from cosa_fast.errors import UserError


@pytest.fixture
def summary(make_config: MakeConfig, tmp_path: Path) -> api.Summary:
    """A run from a configuration file, with an override."""
    torch.set_num_threads(1)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(config_to_dict(make_config())), encoding="utf-8")
    return api.train(api.load_config(file, ["optim.iterations=2", "optim.cotrain_after=1"]))


def test_a_run_and_its_checkpoint_through_all_four(summary: api.Summary, tmp_path: Path) -> None:
    assert summary.iteration == 2
    assert summary.results.keys() == {"on", "an"}
    written = json.loads(summary.folder.results.read_text(encoding="utf-8"))
    assert written["teacher"] == summary.results["an"].summary()
    assert summary.folder.gallery.is_file()

    again = api.evaluate(summary.folder.checkpoint(2))
    assert {name: str(result) for name, result in again.items()} == {n: str(r) for n, r in summary.results.items()}
    only = api.evaluate(summary.folder.checkpoint(2), ["eval.flip=true"], networks=["on"], limit=1)
    assert only.keys() == {"on"}
    assert only["on"].images == 1

    file = picture(tmp_path / "a.png", 60, 40)
    with Image.open(file) as image:
        masks = api.segment(str(summary.folder.checkpoint(2)), [file, image, str(file)], network="on", scales=[1.0])
    assert [(mask.shape, mask.dtype) for mask in masks] == [((40, 60), np.uint8)] * 3
    assert np.array_equal(masks[0], masks[1])
    background = api.segment(summary.folder.checkpoint(2), [file], labels=[])
    assert not background[0].any()


def test_mistakes_are_user_errors(summary: api.Summary, tmp_path: Path) -> None:
    best = summary.folder.checkpoint(2)
    with pytest.raises(UserError, match="lerning_rate"):
        api.load_config("demo.yaml", ["optim.lerning_rate=1"])
    with pytest.raises(UserError, match="belongs to the training"):
        api.evaluate(best, ["loss.csc=0"])
    with pytest.raises(UserError, match="no such file"):
        api.segment(tmp_path / "none.pt", [])
    with pytest.raises(UserError, match="there is no class 'unicorn'"):
        api.segment(best, [], labels=["unicorn"])


def test_one_text_is_a_list_of_one_and_wrong_values_are_named(summary: api.Summary, tmp_path: Path) -> None:
    best = summary.folder.checkpoint(2)
    file = picture(tmp_path / "a.png", 60, 40)
    assert len(api.segment(best, str(file), labels="dots", network="teacher")) == 1
    assert api.evaluate(best, "eval.flip=true", networks="an", limit=1).keys() == {"an"}
    assert api.load_config("demo.yaml", "optim.lr=1e-5").optim.lr == 1e-5
    for wrong, match in (
        (lambda: api.segment(best, [file], network="foo"), "network 'foo': there are 'on' and 'an'"),
        (lambda: api.evaluate(best, networks=["foo"]), "network 'foo'"),
        (lambda: api.evaluate(best, networks=[]), "name 'on', 'an' or both"),
        (lambda: api.segment(best, [np.zeros((4, 4, 3), np.uint8)]), "not ndarray"),
        (lambda: api.segment(best, [file], scales=[0]), "positive numbers"),
        (lambda: api.segment(best, [file], max_side=0), "max_side=0"),
        (lambda: api.train("demo.yaml"), "what load_config returns"),
    ):
        with pytest.raises(UserError, match=match):
            wrong()
