"""Configurations from files, overrides and dictionaries of any content."""

import json
import math
from pathlib import Path
from typing import Any

import yaml
from fuzz.oracle import NUMBERS, TEXTS, VALUES, damaged, fuzzed, held, put
from hypothesis import given
from hypothesis import strategies as st

from cosa_fast.config.parsing import CONFIG_DIRECTORY, config_from_dict, config_to_dict, load_config
from cosa_fast.config.reading import load_yaml
from cosa_fast.config.schema import Config
from cosa_fast.run.folder import RunFolder

VOC = (CONFIG_DIRECTORY / "voc.yaml").read_bytes()
KEYS = [f"{section}.{key}" for section, keys in yaml.safe_load(VOC).items() for key in keys]


def sound(config: Config | None, home: Path) -> None:
    """What is accepted is finite, stays below run.output, and is read again from what a run writes of it."""
    if config is None:
        return
    again = load_yaml(yaml.safe_dump(config_to_dict(config)), "again")
    assert config_from_dict(again, where="again") == config
    output = Path(config.run.output).expanduser()
    assert output in RunFolder.of(config).path.parents
    numbers = [value for section in config_to_dict(config).values() for value in section.values()]
    assert all(math.isfinite(value) for value in numbers if isinstance(value, float))


@st.composite
def overrides(draw: st.DrawFn) -> str:
    key = draw(st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS).map(lambda key: key[:-1]), TEXTS))
    written = VALUES.map(lambda value: json.dumps(value)) | TEXTS | NUMBERS.map(str_or_hex)
    return draw(st.sampled_from(["=", "=", "=", "", "=="])).join((key, draw(written)))


def str_or_hex(value: float) -> str:
    return hex(value) if isinstance(value, int) else str(value)


@fuzzed(60)
@given(st.lists(overrides(), min_size=1, max_size=3))
def test_overrides(tmp_path: Path, given_overrides: list[str]) -> None:
    sound(held(tmp_path, lambda: load_config("voc.yaml", given_overrides), "override", "voc.yaml"), tmp_path)


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    if draw(st.booleans()):
        return draw(damaged(VOC))
    content: Any = yaml.safe_load(VOC)
    for _ in range(draw(st.integers(1, 3))):
        put(content, draw, draw(VALUES))
    return json.dumps(content).encode("utf-8", "surrogatepass")


@fuzzed(60)
@given(st.one_of(documents(), st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode())))
def test_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    sound(held(tmp_path, lambda: load_config(path), "own.yaml", "configuration "), tmp_path)


@fuzzed(40)
@given(st.data())
def test_dictionaries(tmp_path: Path, data: st.DataObject) -> None:
    content: Any = yaml.safe_load(VOC)
    for _ in range(data.draw(st.integers(1, 3))):
        put(content, data.draw, data.draw(VALUES))
    sound(held(tmp_path, lambda: config_from_dict(content, where="1.pt"), "1.pt"), tmp_path)
