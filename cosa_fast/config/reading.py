"""YAML that anybody may have written, read within bounds and without the surprises of YAML 1.1; and values as messages
show them."""

import re
import reprlib
from typing import Any

import yaml

from cosa_fast.errors import UserError, one_line

# Far more than a configuration holds, far less than what exhausts a machine. Aliases count as what they stand for.
LONGEST_TEXT = 200_000
MOST_VALUES = 10_000
DEEPEST = 32

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


def load_yaml(text: str, where: str) -> Any:
    """The document's plain Python value (None of an empty one).

    UserError beginning with `where`: no YAML, other tags than plain values, a key that comes twice, or more than the
    bounds above.
    """
    if len(text) > LONGEST_TEXT:
        raise UserError(f"{where}: {len(text)} characters; a configuration has at most {LONGEST_TEXT}")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:  # of numbers, dates and nesting
        raise UserError(f"{where}: not valid YAML: {one_line(error)}") from None


def check_plain(value: Any, where: str, depth: int = 0) -> int:
    """How many values there are in `value`. UserError beginning with `where` unless it is made of what YAML and JSON
    both have, with texts for keys, within the bounds above.
    """
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise UserError(f"{where}: its keys must be texts")
        inner = list(value.values())
    elif isinstance(value, list | tuple):
        inner = list(value)
    elif value is None or isinstance(value, bool | int | float | str):
        return 1
    else:
        raise UserError(f"{where}: a {type(value).__name__} in it must be a text, a number, a list or a mapping")
    count = 1
    for item in inner:
        count += check_plain(item, where, depth + 1) if depth < DEEPEST else MOST_VALUES
        if count > MOST_VALUES:
            raise UserError(f"{where}: holds more than {MOST_VALUES} values, or is nested deeper than {DEEPEST}")
    return count


def shown(value: Any) -> str:
    """The value as a message shows it: `repr`, cut to about a hundred characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= 120 else f"{text[:119]}…"


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 80
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out numbers of thousands of digits.
        return super().repr_int(x, level) if x.bit_length() < 1000 else f"a number of {x.bit_length()} bits"


_SHORT = _Short()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but 0100 is a hundred (YAML 1.1: sixty-four) and 1:30 a text (YAML 1.1: ninety)."""

    def decimal(self, node: yaml.ScalarNode) -> int:
        """An int, decimal unless it begins with 0x or 0b."""
        text = self.construct_scalar(node).replace("_", "")
        return int(text, {"0x": 16, "0b": 2}.get(text.lstrip("+-")[:2], 10))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)\Z"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"
    ),
    list("-+0123456789."),
)
_Loader.add_constructor(_INT, _Loader.decimal)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], depth: int = 0) -> tuple[int, int]:
    """(values, levels) of what a node expands to. YAMLError where that is out of bounds, and for a doubled key."""
    if depth > DEEPEST:
        raise yaml.YAMLError(f"nested deeper than {DEEPEST}, or an alias that contains itself")
    if id(node) not in known:
        inner = [_measure(child, known, depth + 1) for child in _children(node)]
        levels = 1 + max((levels for _, levels in inner), default=0)
        known[id(node)] = 1 + sum(count for count, _ in inner), levels
    count, levels = known[id(node)]
    if count > MOST_VALUES or depth + levels > DEEPEST:
        raise yaml.YAMLError(f"more than {MOST_VALUES} values, or nested deeper than {DEEPEST}")
    return count, levels


def _children(node: yaml.Node) -> list[yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        return node.value if isinstance(node, yaml.SequenceNode) else []
    names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise yaml.YAMLError(f"the key {shown(twice)} comes twice")
    return [part for pair in node.value for part in pair]
