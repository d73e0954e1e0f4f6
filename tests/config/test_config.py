"""The configuration: strict in what it accepts, and the shipped recipes hold the method's settings exactly."""

import dataclasses
import typing
from pathlib import Path

import pytest
import torch
import yaml

from cosa_fast.config.parsing import CONFIG_DIRECTORY, config_from_dict, config_to_dict, load_config, saved_config
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.views.parameters import AugmentConfig
from cosa_fast.errors import UserError
from cosa_fast.evaluation.networks import FORMAT, load
from cosa_fast.run.folder import RunFolder


def message(*overrides: str, config: str = "voc.yaml") -> str:
    with pytest.raises(UserError) as caught:
        load_config(config, overrides)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 500
    return str(caught.value)


def test_voc_carries_the_paper_recipe() -> None:
    config = load_config("voc.yaml")
    assert config.model.backbone == "vit_base_patch16_224.orig_in21k_ft_in1k"
    assert (config.model.aux_layer, config.model.decoder_width, config.model.decoder_dilation) == (-3, 512, 5)
    assert (config.data.crop_size, config.data.scale_range, config.data.blur_radius) == (448, (0.5, 2.0), (0.1, 2.0))
    assert (config.data.mean, config.data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (config.data.train_split, config.data.val_split) == ("train_aug", "val")
    assert (config.teacher.scales, config.teacher.flip, config.teacher.momentum) == ((1.0, 0.5, 1.5), True, 0.9994)
    assert (config.threshold.mode, config.threshold.queue_length, config.threshold.bins) == ("dynamic", 100, 256)
    assert config.threshold.floor == 0.05
    loss = config.loss
    assert (loss.cls, loss.cls_aux, loss.c2s, loss.c2s_aux) == (1.0, 1.0, 0.1, 0.1)
    assert (loss.s2c, loss.csc, loss.energy, loss.foreground_weight) == (0.05, 0.1, 0.0, 0.5)
    assert (loss.reliability, loss.alpha, loss.beta, loss.s2c_temperature) == ("perplexity", 0.8, 1.0, 0.01)
    assert (loss.s2c_relu, loss.csc_epsilon, loss.csc_temperature) == (False, 1.0, 0.5)
    assert (loss.csc_scope, loss.csc_similarity, loss.guidance) == ("image", "cosine", "teacher")
    assert loss.csc_vectors == "probability"
    optim = config.optim
    assert (optim.iterations, optim.batch_size, optim.cotrain_after) == (32000, 4, 6000)
    assert (optim.lr, optim.head_multiplier, optim.betas, optim.weight_decay) == (6e-5, 10.0, (0.9, 0.999), 0.01)
    assert (optim.warmup, optim.warmup_lr, optim.power) == (1500, 1e-6, 0.9)
    assert config.eval.scales == (1.0, 0.5, 1.5, 0.75, 1.25)
    assert config.eval.flip


def test_a_run_from_before_csc_vectors_keeps_its_logits(tmp_path: Path) -> None:
    """Its loss compared logits; resuming it on probabilities is a difference in the settings, and said to be one."""
    values = config_to_dict(load_config("voc.yaml"))
    for csc_vectors, expected in (("probability", "probability"), ("logits", "logits"), (None, "logits")):
        values["loss"].pop("csc_vectors", None)
        if csc_vectors:
            values["loss"]["csc_vectors"] = csc_vectors
        torch.save({"format": FORMAT, "config": values}, tmp_path / "1.pt")
        read = config_from_dict(load(tmp_path / "1.pt")["config"], where="1.pt")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        assert read.loss.csc_vectors == saved_config(tmp_path / "config.yaml").loss.csc_vectors == expected


def test_coco_differs_from_voc_only_in_data_and_schedule() -> None:
    voc, coco = load_config("voc.yaml"), load_config("coco.yaml")
    assert (coco.optim.iterations, coco.optim.batch_size, coco.optim.cotrain_after) == (60000, 8, 10000)
    assert coco.data.format == "coco"
    assert (coco.model, coco.teacher, coco.threshold, coco.loss) == (voc.model, voc.teacher, voc.threshold, voc.loss)


@pytest.mark.parametrize(
    ("name", "base", "band", "after"),
    [
        ("voc_published.yaml", "voc.yaml", (0.20, 0.70), 6001),
        ("coco_published.yaml", "coco.yaml", (0.25, 0.65), 10001),
    ],
)
def test_published_recipes(name: str, base: str, band: tuple[float, float], after: int) -> None:
    config = load_config(name)
    assert (config.threshold.mode, config.threshold.band, config.threshold.band_aux) == ("band", band, (0.25, 0.70))
    loss = config.loss
    assert (loss.c2s, loss.c2s_aux, loss.s2c, loss.csc, loss.energy) == (0.05, 0.05, 0.05, 0.0, 0.03)
    assert (loss.s2c_relu, loss.reliability, loss.foreground_weight) == (True, "none", 0.5)
    assert (loss.energy_sigma_xy, loss.energy_sigma_rgb) == (100.0, 15.0)
    changed = {"cotrain_after": after, "warmup_ratio": 1e-6, "update_unused": True}
    assert config.optim == dataclasses.replace(load_config(base).optim, **changed)
    assert (config.model.position_resampling, config.model.head_start) == ("plain", "uniform")
    assert (config.threshold.grid, config.teacher.aux_scales) == ("half", "last")
    assert (config.data.padding, loss.s2c_padding) == ("black", True)
    assert (config.eval.protocol, config.eval.select) == ("squashed", "label-aware")


def test_voc_yaml_states_every_setting() -> None:
    written = yaml.safe_load((CONFIG_DIRECTORY / "voc.yaml").read_text())
    fields = {
        field.name: {item.name for item in dataclasses.fields(field.default_factory())}
        for field in dataclasses.fields(Config)
    }
    assert {section: set(keys) for section, keys in written.items()} == fields


def test_round_trip_through_a_dictionary() -> None:
    config = load_config("coco_published.yaml", ["eval.classes=[cat, dog]", "model.aux_layer=null"])
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(config_to_dict(config))), where="x") == config


def test_overrides_apply_in_order_and_read_yaml() -> None:
    config = load_config("voc.yaml", ["optim.lr=1", "optim.lr=1e-4", "teacher.scales=[1]", "data.labels=null"])
    assert config.optim.lr == 1e-4
    assert config.teacher.scales == (1.0,)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean 'optim.lr'?"]),
        ("dta.root=x", ["dta", "did you mean 'data'?"]),
        ("optim.batch_size=four", ["optim.batch_size", "'four'", "whole number"]),
        ("optim.batch_size=0", ["optim.batch_size", "0", ">= 1"]),
        ("optim.batch_size=2.5", ["optim.batch_size", "2.5", "whole number"]),
        ("optim.batch_size=true", ["optim.batch_size", "whole number"]),
        ("optim.lr=.nan", ["optim.lr", "nan"]),
        ("teacher.flip=1", ["teacher.flip", "true or false"]),
        ("threshold.mode=dynamik", ["threshold.mode", "did you mean 'dynamic'?"]),
        ("teacher.scales=1.0", ["teacher.scales", "list"]),
        ("teacher.scales=[]", ["teacher.scales", "empty"]),
        ("data.mean=[1, 2]", ["data.mean", "3 values"]),
        ("data.scale_range=[2.0, 0.5]", ["data.scale_range", "low <= high"]),
        ("data.crop_size=8", ["data.crop_size is 8", "at least 16"]),
        ("data.std=[1, 0, 1]", ["data.std", "0.001"]),
        ("data.blur_probability=.nan", ["data.blur_probability = nan", "finite"]),
        ("optim.zzz=1", ["optim.zzz", "valid here: optim.iterations, optim.batch_size"]),
        ("loss.alpha=1.0", ["loss.alpha", "0.999"]),
        ("model.aux_layer=2", ["model.aux_layer", "<= -1"]),
        ("data=3", ["data", "section"]),
        ("optim.lr", ["key=value"]),
        ("optim.lr=[", ["YAML"]),
        ("optim.iterations=100", ["cotrain_after", "6000"]),
        ("threshold.mode=band", ["loss.csc=0", "reliability"]),
        ("loss={cls: 0, cls_aux: 0}", ["loss.cls", "cotrain_after"]),
        ("loss.beta=50", ["loss.beta", "<= 10"]),
        ("optim.lr=.inf", ["optim.lr = inf", "<= 1e+30"]),
        ("optim.lr=1e999", ["optim.lr = inf"]),
        ("optim.weight_decay=1e300", ["optim.weight_decay", "<= 100"]),
        ("loss.csc_temperature=.inf", ["loss.csc_temperature = inf"]),
        ("data.std=[.inf, 1, 1]", ["data.std = inf", "finite"]),
        ("data.mean=[1e30, 1, 1]", ["data.mean = 1e+30", "finite"]),
        ("data.mean=[1e9, 1, 1]", ["data.mean", "1000"]),
        (f"optim.batch_size={2**63}", ["optim.batch_size", "<= 65536"]),
        (f"optim.batch_size={'9' * 5000}", ["optim.batch_size", "digits"]),
        (f"optim.batch_size=0x{'9' * 5000}", ["optim.batch_size", "a number of 20000 bits"]),
        (f"data.crop_size=0x{'9' * 5000}", ["data.crop_size", "a number of 20000 bits"]),
        (f"optim.lr=0x{'9' * 5000}", ["optim.lr = inf"]),
        (f"data.root={'x' * 100000}", ["override 'data.root=x", "100000 characters"]),
        (f"optim.lr={'[' * 5000}", ["optim.lr", "YAML"]),
        (f"model.arguments={'[' * 40}{']' * 40}", ["model.arguments", "nested deeper than 32"]),
        (f"{'a.' * 100000}b=1", ["unknown key a;"]),
        (f"{'k' * 100000}=1", ["unknown key kkk"]),
        ('data.root="a\\0b"', ["data.root = 'a\\x00b'", "character"]),
        ('data.classes=["a\\nb"]', ["data.classes", "character"]),
        ("data.root=\udcff", ["data.root=\\udcff", "character"]),
        (f"data.root=data/{'x' * 300}/y", ["data.root", "at most 255"]),
        (f"data.train_split={'x' * 300}", ["data.train_split", "at most 255"]),
        ("run.name=../../outside", ["run.name = '../../outside'", "below run.output"]),
        ("run.name=/tmp/x", ["run.name = '/tmp/x'", "below run.output"]),
        ("run.name=''", ["run.name = ''", "below run.output"]),
        ("run.name=.", ["run.name = '.'", "below run.output"]),
        ("run.output=''", ["run.output is empty"]),
        ("run.output=~nobody_of_this_name/runs", ["run.output", "no user"]),
        ("run.seed=1:30", ["run.seed = '1:30'", "whole number"]),
        ("run.seed=2001-99-99", ["run.seed", "not valid YAML"]),
        ("model={aux_layer: -1, aux_layer: -2}", ["the key 'aux_layer' comes twice"]),
        ("model.arguments={1: 2}", ["model.arguments", "keys must be texts"]),
        ("model.arguments={a: 2001-01-01}", ["model.arguments", "date"]),
    ],
)
def test_bad_values_are_refused_in_one_line_that_names_key_and_remedy(override: str, parts: list[str]) -> None:
    text = message(override)
    for part in parts:
        assert part in text


def test_every_number_has_both_bounds() -> None:
    """Nothing absurd is to reach what computes: the settings of the views check themselves, with bounds for each."""
    inherited = {item.name for item in dataclasses.fields(AugmentConfig)}
    for section in dataclasses.fields(Config):
        kinds = typing.get_type_hints(section.default_factory)
        for item in dataclasses.fields(section.default_factory):
            numeric = {int, float} & {kinds[item.name], *typing.get_args(kinds[item.name])}
            if numeric and not (section.name == "data" and item.name in inherited):
                assert {"low", "high"} <= item.metadata.keys(), f"{section.name}.{item.name}"
    for name in ("crop_size", "scale_range", "blur_radius", "mean", "std", "flip_probability", "blur_probability"):
        count = {"scale_range": 2, "blur_radius": 2, "mean": 3, "std": 3}.get(name)
        for value in (1e6, -1e6):
            text = str([value] * count) if count else str(int(value)) if name == "crop_size" else str(value)
            assert f"data.{name}" in message(f"data.{name}={text}")


def test_a_billion_values_in_ten_lines_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    for first, level in (("[x]", "[{}]"), ("{x: 1}", "{{<<: [{}]}}")):
        lines = [f"a0: &a0 {first}"]
        lines += [f"a{k}: &a{k} {level.format(', '.join([f'*a{k - 1}'] * 10))}" for k in range(1, 10)]
        path.write_text("\n".join(lines))
        assert "more than 10000 values" in message(config=str(path))
    path.write_text("model: &a [*a]\n")
    assert "contains itself" in message(config=str(path))
    path.write_text("x" * 10**6)
    assert "too large" in message(config=str(path))
    loop: dict = {}
    loop["again"] = loop
    with pytest.raises(UserError, match=r"model\.arguments: holds more than 10000 values"):
        config_from_dict({"model": {"arguments": loop}}, where="x.pt")


def test_numbers_mean_what_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("base: voc.yaml\nrun: {seed: 0100, log_every: 1_000, keep: 0x10}\noptim: {lr: 1e-3, power: .5}\n")
    config = load_config(path)
    assert (config.run.seed, config.run.log_every, config.run.keep) == (100, 1000, 16)
    assert (config.optim.lr, config.optim.power) == (1e-3, 0.5)


def test_a_run_is_written_below_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config("voc.yaml", ["run.output=~/runs", "run.name=study/a"])
    assert RunFolder.of(config).path == tmp_path / "runs" / "study" / "a"


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: voc.yaml\noptim:\n  learning_rate: 1.0e-4\n")
    assert str(path) in message(config=str(path))
    path.write_text("optim: [1\n")
    assert str(path) in message(config=str(path))
    path.write_text("- 1\n")
    assert "mapping" in message(config=str(path))
    path.write_text("base: mine.yaml\n")
    assert "leads back" in message(config=str(path))
    assert "voc_published.yaml" in message(config="no_such.yaml")


def test_own_file_on_top_of_a_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: voc_published.yaml\nloss:\n  csc: 0.0\n  energy: 0.0\n")
    config = load_config(path)
    assert config.loss == dataclasses.replace(load_config("voc_published.yaml").loss, energy=0.0)


def test_on_and_off_mean_themselves_though_yaml_reads_booleans(tmp_path: Path) -> None:
    config = load_config("voc.yaml", ["run.compile=off", "run.capture=off"])
    assert (config.run.compile, config.run.capture) == ("off", "off")
    assert load_config("voc.yaml", ["run.compile=on"]).run.compile == "on"
    file = tmp_path / "own.yaml"
    file.write_text("base: voc.yaml\nrun: {compile: off}\n", encoding="utf-8")
    assert load_config(file).run.compile == "off"
    assert "run.capture = 'on' must be one of auto, off" in message("run.capture=on")
    assert "must be one of" in message("run.engine=on")


def test_a_mapping_is_replaced_as_a_whole_and_an_entry_of_it_alone(tmp_path: Path) -> None:
    assert load_config("demo.yaml").model.arguments["depth"] == 4
    assert load_config("demo.yaml", ["model.arguments={}"]).model.arguments == {}
    assert load_config("demo.yaml", ["model.arguments={depth: 2}"]).model.arguments == {"depth": 2}
    model = load_config("demo.yaml", ["model={arguments: {}}"]).model
    assert (model.arguments, model.backbone) == ({}, "vit_tiny_patch16_224"), "of a section the rest stays"
    changed = load_config("demo.yaml", ["model.arguments.depth=2", "model.arguments.mlp={ratio: 3}"]).model.arguments
    assert changed == {**load_config("demo.yaml").model.arguments, "depth": 2, "mlp": {"ratio": 3}}
    (tmp_path / "mine.yaml").write_text("base: demo.yaml\nmodel: {arguments: {}}\n")
    assert load_config(tmp_path / "mine.yaml").model.arguments == {}


@pytest.mark.parametrize("text", ["", "# data:\n#   root: x\n", "{}\n", "---\n"])
def test_an_empty_file_is_no_configuration(text: str, tmp_path: Path) -> None:
    """It would train on VOC, as the defaults have it."""
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("base: mine.yaml\nrun: {name: other}\n")
    for name in ("mine.yaml", "other.yaml"):
        with pytest.raises(UserError, match=r"mine\.yaml: is empty; begin it with base: voc\.yaml"):
            load_config(tmp_path / name)
