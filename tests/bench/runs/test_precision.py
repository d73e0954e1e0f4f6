"""bench/runs/precision.py: the loss curves of bfloat16 and float32 training lie on each other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from bench_support import assert_keys_of

from bench.runs import precision
from cosa_fast.config.parsing import config_to_dict
from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError


def written(config: Config, folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config)), encoding="utf-8")
    return str(path)


def test_window_means_of_both_precisions_agree(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config("optim.iterations=24", "optim.cotrain_after=8", "optim.lr=2e-4", "teacher.scales=[1.0]")
    out = tmp_path / "precision.json"
    assert precision.main([written(config, tmp_path), "--window", "4", "--out", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert_keys_of("precision_cpu.json", found)
    assert set(found["phases"]) == {"classification", "co-training"}
    assert "c2s" not in found["phases"]["classification"]
    for terms in found["phases"].values():
        for name in ("loss", "cls", "cls_aux"):
            assert len(terms[name]["fp32"]) == len(terms[name]["bf16"]) >= 2
            assert terms[name]["fp32"] != terms[name]["bf16"]  # two precisions, not one run twice
            assert terms[name]["largest_difference"] < 0.03, name
    assert set(found["evaluation"]) == {"fp32", "bf16"}


def test_a_window_longer_than_the_run_is_refused(make_config: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--window 7: give 1 to optim\.iterations = 6$"):
        precision.main([written(make_config(), tmp_path), "--window", "7"])
