"""The house: which wing may import which, that nothing imports in a circle, that files stay short enough to be read."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up. Wings of one floor do not import each other.
FLOORS = [
    {"errors"},
    {"files"},
    {"kernels", "data_pipeline"},
    {"config", "device", "distributed"},
    {"network"},
    {"method"},
    {"engine", "evaluation"},
    {"pictures"},
    {"run"},
    {"report"},
    {"doors"},
    {"bench"},
]
DOORS = {"train", "evaluate", "predict", "prepare", "demo", "export"}
DOORS_AND_WHAT_THEY_SHARE = {*DOORS, "api", "cli"}
LONGEST = 450
# What the head of a longer file says, with the reason.
EXCUSE = "This file is long"


def modules() -> dict[str, Path]:
    """Every file of the product by its import name."""
    found = {}
    for top, package in {
        "cosa_fast": "cosa_fast",
        "kernels": "cosa_fast.kernels",
        "data_pipeline": "cosa_fast.data_pipeline",
        "bench": "bench",
    }.items():
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            if top == "cosa_fast" and parts[0] in ("kernels", "data_pipeline"):
                continue  # the symlinks
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


@cache
def imports(name: str) -> frozenset[str]:
    """The modules of the product that a module imports anywhere, under TYPE_CHECKING and inside functions too."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULES else source for module in inner}
    return frozenset(found & MODULES.keys()) - {name}


def wing(name: str) -> str:
    """The wing of a module; "doors" for what stands at the top of cosa_fast/ and is no ground."""
    parts = name.split(".")
    if parts[0] == "bench":
        return "bench"
    if len(parts) == 1:
        return "errors"  # cosa_fast itself: its version, which anybody may read
    return "doors" if parts[1] in DOORS_AND_WHAT_THEY_SHARE or parts[-1] == "__main__" else parts[1]


def floor(name: str) -> int:
    return next(level for level, wings in enumerate(FLOORS) if wing(name) in wings)


def test_imports_point_down() -> None:
    upward = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imports(name)
        if wing(name) != wing(other) and floor(name) <= floor(other)
    ]
    assert not upward, "\n".join(sorted(upward))


def test_nothing_imports_in_a_circle() -> None:
    try:
        TopologicalSorter({name: imports(name) for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_nobody_imports_a_door() -> None:
    doors = {f"cosa_fast.{door}" for door in DOORS} | {name for name in MODULES if name.endswith(".__main__")}
    callers = [f"{name} imports {door}" for name in MODULES for door in doors & imports(name)]
    assert not callers, "\n".join(callers)


def test_a_wing_says_what_its_files_are_for() -> None:
    """The docstring of a package names every file and folder in it, so that a newcomer finds them there."""
    missing = []
    for name, path in MODULES.items():
        if path.name != "__init__.py" or name == "cosa_fast":
            continue
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        inside = {
            entry.stem for entry in path.parent.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").exists()
        }
        missing += [f"{name}: {stem}" for stem in sorted(inside - {"__init__"}) if stem not in said]
    assert not missing, "\n".join(missing)


def test_files_are_of_a_size_to_be_read() -> None:
    long = {}
    for name, path in MODULES.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > LONGEST and EXCUSE not in "\n".join(lines[:60]):
            long[name] = len(lines)
    assert not long


def test_the_top_of_the_package_stays_small() -> None:
    assert len(list((ROOT / "cosa_fast").glob("*.py"))) <= 14
