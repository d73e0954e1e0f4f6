"""Configurations from YAML files, dictionaries and `key=value` overrides, and back.

Reading is strict: an unknown key, a wrong type or a value out of range is a UserError of one line that names the file
or override, the key and the value.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from cosa_fast.config.reading import DEEPEST, LONGEST_TEXT, check_plain, load_yaml, shown
from cosa_fast.config.schema import Config, check_combinations
from cosa_fast.errors import UserError, hint
from cosa_fast.files import nearest, read_text

CONFIG_DIRECTORY = Path(__file__).parents[1] / "configs"
LONGEST_NAME = 4096  # of a path, on Linux
T = TypeVar("T")


def load_config(path: str | Path, overrides: str | Sequence[str] = ()) -> Config:
    """Read a YAML file (`voc.yaml` without a folder is found among the shipped ones), then apply `key=value` overrides
    in order; a single text is one.

    A `base: other.yaml` key takes another file's settings first; that file is looked up beside this one, then among the
    shipped ones. A setting's value is replaced as a whole, be it a list or a mapping: `model.arguments={}` clears what
    the file has, `model.arguments={depth: 2}` leaves nothing but that; `model.arguments.depth=2` changes one entry.
    UserError as the head of this module says, and for an empty file; for a misspelt key it names the nearest valid one.
    """
    overrides = [overrides] if isinstance(overrides, str) else overrides
    return config_from_dict(_read_with_base(find_config(Path(path))), overrides, where=str(path))


def config_from_dict(values: dict[str, Any], overrides: Sequence[str] = (), *, where: str) -> Config:
    """A Config from nested dictionaries and `key=value` overrides. `where` names the dictionaries' origin in errors."""
    config = _build(Config, values, where)
    for override in overrides:
        origin = f"override {shown(override)}"
        # One at a time, each against the whole: an error then names the very override that caused it.
        values = _merge(values, _read_override(override, origin, values))
        config = _build(Config, values, origin)
    check_combinations(config, where)
    return config


def saved_config(path: Path) -> Config:
    """What a run left in its config.yaml. UserErrors as in `load_config`."""
    return config_from_dict(completed(_read_yaml(path)), where=str(path))


def completed(saved: Any) -> Any:
    """The settings that a run has saved, as `config_to_dict` gave them, with those that were not there at its time."""
    loss = saved.get("loss") if isinstance(saved, dict) else None
    if not isinstance(loss, dict):
        return saved
    return {**saved, "loss": {"csc_vectors": "logits", **loss}}  # before there was a choice, csc compared logits


def config_to_dict(config: Config) -> dict[str, Any]:
    """The nested plain dictionary (lists instead of tuples) that YAML and a checkpoint can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(dataclasses.asdict(config))


def find_config(path: Path, beside: Path | None = None) -> Path:
    """The file that `path` means: itself, that name in the folder `beside`, or one of the shipped configurations."""
    candidates = [path, *([beside / path] if beside else []), CONFIG_DIRECTORY / path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = sorted(file.name for file in CONFIG_DIRECTORY.glob("*.yaml"))
    if "=" in path.name:
        what = "is a setting; the configuration comes before it, one of the shipped ones"
    elif path.is_dir():
        what = f"is a folder; images of your own are trained on with folder.yaml data.root={path}; shipped are"
    else:
        near = hint(path.name, shipped) if path.parent == Path() else ""
        what = f"no such file{near or nearest(path)}, nor one of the shipped ones"
    raise UserError(f"configuration {shown(str(path))[1:-1]}: {what} ({', '.join(shipped)})")


def _read_with_base(source: Path, visited: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a file laid over those of its `base`, and so on down."""
    if source.resolve() in visited:
        raise UserError(f"{source}: 'base' leads back to the file itself; remove one of the 'base' keys")
    values = _read_yaml(source)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{source}: base = {shown(base)} must be the name of a YAML file")
    parent = find_config(Path(base), beside=source.parent)
    return _merge(_read_with_base(parent, (*visited, source.resolve())), values)


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.stat().st_size > 4 * LONGEST_TEXT:
        raise UserError(f"{path}: far too large for a configuration; give the YAML file of one")
    values = load_yaml(read_text(path), str(path))
    if not values and (values is None or isinstance(values, dict)):
        raise UserError(f"{path}: is empty; begin it with base: voc.yaml, or another of the shipped files, or copy one")
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: must be a mapping of sections (data, model, ...), but holds a {type(values).__name__}"
        )
    return values


def _read_override(override: str, origin: str, values: dict[str, Any]) -> dict[str, Any]:
    """`optim.lr=1e-4` as nested dictionaries; the value is YAML. An entry of a setting, `model.arguments.depth=2`,
    comes with the others that `values` has there."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{origin}: write it as key=value, for example optim.lr=1e-4")
    value = load_yaml(text, origin)
    parts = key.split(".", DEEPEST)
    for depth in reversed(range(len(parts))):
        value = {**(_mapping_at(values, parts[:depth]) if depth > 1 else {}), parts[depth]: value}
    return value


def settings_named(override: str) -> list[str]:
    """The settings, as SECTION.KEY, that `key=value` changes: `loss={csc: 0}` and `loss.csc=0` are one. UserError for a
    value that is no YAML."""
    key, _, text = override.partition("=")
    section, *entry = key.split(".")
    if entry:
        return [f"{section}.{entry[0]}"]
    value = load_yaml(text, f"override {shown(override)}")
    return [f"{section}.{name}" for name in value] if isinstance(value, dict) else [section]


def _mapping_at(values: Any, parts: Sequence[str]) -> dict[str, Any]:
    """What is under a dotted key; nothing where that is no mapping."""
    for part in parts:
        values = values.get(part) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it: of each section the settings that it names, each as a whole."""
    result = dict(base)
    for section, settings in changes.items():
        both = isinstance(settings, dict) and isinstance(result.get(section), dict)
        result[section] = {**result[section], **settings} if both else settings
    return result


def _build(cls: type[T], values: Any, where: str, prefix: str = "") -> T:
    """An instance of dataclass `cls` from a mapping; `prefix` is the dotted key of the mapping itself."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: {prefix.rstrip('.')} = {shown(values)} must be a section with keys of its own")
    kinds = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        said = (key if isinstance(key, str) else shown(key))[:80]
        name = f"{prefix}{said}"
        if key not in fields:
            remedy = hint(said, fields, prefix) or f"; valid here: {', '.join(prefix + field for field in fields)}"
            raise UserError(f"{where}: unknown key {name}{remedy}")
        if dataclasses.is_dataclass(kinds[key]):
            arguments[key] = _build(kinds[key], value, where, f"{name}.")
        else:
            arguments[key] = _convert(value, kinds[key], where, name)
            _check_range(arguments[key], fields[key].metadata, where, name)
    try:
        return cls(**arguments)
    except ValueError as error:  # of a section that checks itself
        raise UserError(f"{where}: {prefix}{error}") from None


def _convert(value: Any, kind: Any, where: str, name: str) -> Any:
    """`value` as the annotation `kind` wants it."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(option for option in options if option is not type(None)), where, name)
    if origin is Literal:
        return _convert_choice(value, options, where, name)
    if origin is tuple:
        return _convert_tuple(value, options, where, name)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: {name} = {shown(value)} must be a mapping")
        check_plain(value, f"{where}: {name}")
        return value
    return _convert_scalar(value, kind, where, name)


def _convert_choice(value: Any, options: tuple[str, ...], where: str, name: str) -> str:
    if isinstance(value, bool) and "off" in options:
        value = "on" if value else "off"  # which YAML reads as booleans
    if value not in options:
        nearest = hint(value, options) if isinstance(value, str) else ""
        raise UserError(f"{where}: {name} = {shown(value)} must be one of {', '.join(options)}{nearest}")
    return value


def _convert_tuple(value: Any, options: tuple[Any, ...], where: str, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: {name} = {shown(value)} must be a list, for example [..., ...]")
    if options[-1] is Ellipsis:
        return tuple(_convert(item, options[0], where, name) for item in value)
    if len(value) != len(options):
        raise UserError(f"{where}: {name} = {shown(list(value))} must hold {len(options)} values, not {len(value)}")
    return tuple(_convert(item, option, where, name) for item, option in zip(value, options, strict=True))


def _convert_scalar(value: Any, kind: type, where: str, name: str) -> Any:
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 6e-5 (no dot) as a string; every user means the number.
        try:
            value = float(value)
        except ValueError:
            raise UserError(f"{where}: {name} = {shown(value)} must be a number") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**63 else math.inf
    if type(value) is not kind:
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
        raise UserError(f"{where}: {name} = {shown(value)} must be {expected}")
    if isinstance(value, str) and any(c < " " or c == "\x7f" or "\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where}: {name} = {shown(value)} holds a character that no name has; take it out")
    if isinstance(value, str) and len(value) > LONGEST_NAME:
        raise UserError(f"{where}: {name} has {len(value)} characters; wanted at most {LONGEST_NAME}")
    return value


def _check_range(value: Any, limits: Any, where: str, name: str) -> None:
    """UserError unless the number, or every number of the tuple, is finite and within what `bounded` says."""
    low, high = limits.get("low"), limits.get("high")
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, int | float):
            continue
        if not ((low is None or number >= low) and (high is None or number <= high)):
            bounds = " and ".join([f">= {low}"] * (low is not None) + [f"<= {high}"] * (high is not None))
            raise UserError(f"{where}: {name} = {shown(number)} is out of range, it must be {bounds}")
        if low is None and high is None and not abs(number) < 2**63:
            raise UserError(f"{where}: {name} = {shown(number)} is out of range, it must be a finite number")
