"""One undisturbed run, and the process from which all others are forked, for all tests of faults."""

from collections.abc import Iterator

import pytest
from faults.killing import Nursery, Study, nursery


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("nursery")) as place:
        yield place


@pytest.fixture(scope="session")
def study(place: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(place, tmp_path_factory.mktemp("study"))
