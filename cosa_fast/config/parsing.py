"""Strict reading of nested dictionaries into frozen dataclasses: unknown keys, wrong types and values out of range
are UserErrors."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from cosa_fast.config.schema import Config, check_combinations
from cosa_fast.errors import UserError

T = TypeVar("T")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError with the line of a syntax error."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: must be a mapping of sections (data, model, ...), but holds a {type(values).__name__}"
        )
    return values


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["optim.lr=1e-4"]` as nested dictionaries; values are YAML."""
    result: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override '{override}': write it as key=value, for example optim.lr=1e-4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"override '{override}': the value is not valid YAML") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def build(cls: type[T], values: Any, where: str, prefix: str = "") -> T:
    """An instance of dataclass `cls` from a mapping; `prefix` is the dotted key of the mapping itself."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: {prefix.rstrip('.')} = {values!r} must be a section with keys of its own")
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown key {prefix}{key}; {_hint(str(key), list(fields), prefix)}")
    arguments = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if dataclasses.is_dataclass(hints[key]):
            arguments[key] = build(hints[key], value, where, f"{name}.")
        else:
            arguments[key] = _convert(value, hints[key], where, name)
            _check_range(arguments[key], fields[key].metadata, where, name)
    return cls(**arguments)


def _hint(key: str, valid: list[str], prefix: str) -> str:
    nearest = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if nearest:
        return f"did you mean {prefix}{nearest[0]}?"
    return f"valid here: {', '.join(prefix + name for name in valid)}"


def _convert(value: Any, kind: Any, where: str, name: str) -> Any:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(option for option in options if option is not type(None)), where, name)
    if origin is Literal:
        if isinstance(value, bool) and "off" in options:
            value = "on" if value else "off"  # which YAML reads as booleans
        if value not in options:
            nearest = difflib.get_close_matches(str(value), [str(option) for option in options], n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise UserError(f"{where}: {name} = {value!r} must be one of {', '.join(map(str, options))}{hint}")
        return value
    if origin is tuple:
        return _convert_tuple(value, options, where, name)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: {name} = {value!r} must be a mapping")
        return value
    return _convert_scalar(value, kind, where, name)


def _convert_tuple(value: Any, options: tuple[Any, ...], where: str, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: {name} = {value!r} must be a list, for example [..., ...]")
    if options[-1] is Ellipsis:
        return tuple(_convert(item, options[0], where, name) for item in value)
    if len(value) != len(options):
        raise UserError(f"{where}: {name} = {list(value)!r} must hold {len(options)} values, not {len(value)}")
    return tuple(_convert(item, option, where, name) for item, option in zip(value, options, strict=True))


def _convert_scalar(value: Any, kind: type, where: str, name: str) -> Any:
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 6e-5 (no dot) as a string; every user means the number.
        try:
            value = float(value)
        except ValueError:
            raise UserError(f"{where}: {name} = {value!r} must be a number") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
        raise UserError(f"{where}: {name} = {value!r} must be {expected}")
    return value


def _check_range(value: Any, limits: Any, where: str, name: str) -> None:
    low, high = limits.get("low"), limits.get("high")
    for number in value if isinstance(value, tuple) else (value,):
        if number is None or isinstance(number, str):
            continue
        # Written so that NaN fails.
        if not ((low is None or number >= low) and (high is None or number <= high)):
            bounds = " and ".join([f">= {low}"] * (low is not None) + [f"<= {high}"] * (high is not None))
            raise UserError(f"{where}: {name} = {number} is out of range, it must be {bounds}")


CONFIG_DIRECTORY = Path(__file__).parents[1] / "configs"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (`voc.yaml` without a path is found among the shipped ones), then apply `key=value` overrides
    in order.

    A `base: other.yaml` key takes another file's settings first (looked up beside the file, then among the shipped
    ones).

    Raises UserError with one line that names file, key and value: unknown key (with the nearest valid one), wrong
    type, out of range.
    """
    source = find_config(Path(path))
    return config_from_dict(_read_with_base(source, ()), overrides, where=str(path))


def config_from_dict(values: dict[str, Any], overrides: Sequence[str] = (), *, where: str) -> Config:
    """Build a Config from nested dictionaries (`where` names their origin in errors) and `key=value` overrides."""
    config = build(Config, values, where)
    for override in overrides:
        # One at a time, each against the whole: an error then names the very override that caused it.
        values = merge(values, read_overrides([override]))
        config = build(Config, values, f"override '{override}'")
    check_combinations(config, where)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """The nested plain dictionary (lists instead of tuples) that YAML and a checkpoint can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(dataclasses.asdict(config))


def find_config(path: Path, beside: Path | None = None) -> Path:
    """The file that `path` means: itself, beside another file, or one of the shipped configurations."""
    candidates = [path, *([beside / path] if beside else []), CONFIG_DIRECTORY / path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(file.name for file in CONFIG_DIRECTORY.glob("*.yaml")))
    raise UserError(f"configuration {path}: no such file, nor one of the shipped ones ({shipped})")


def _read_with_base(source: Path, visited: tuple[Path, ...]) -> dict[str, Any]:
    if source.resolve() in visited:
        raise UserError(f"{source}: 'base' leads back to the file itself; remove one of the 'base' keys")
    values = read_yaml(source)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{source}: base = {base!r} must be the name of a YAML file")
    parent = find_config(Path(base), beside=source.parent)
    return merge(_read_with_base(parent, (*visited, source.resolve())), values)
