"""The environment in which a launcher starts processes: complete, or named in one line; met in time, or given up."""

import socket
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from cosa_fast import distributed
from cosa_fast.distributed import ranks_of_launch
from cosa_fast.errors import UserError

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "TIME_TO_MEET", timedelta(seconds=1))
    yield monkeypatch
    assert not dist.is_initialized()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port at which somebody listens, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def refusal() -> str:
    with pytest.raises(UserError) as caught, ranks_of_launch("cpu"):
        pytest.fail("a process group of one of two")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_what_is_missing_is_named(name: str, launched: pytest.MonkeyPatch) -> None:
    launched.delenv(name)
    assert refusal() == f"{name} in the environment is missing: start the processes with torchrun, or unset RANK"


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT") for value in ("two", "", "-1", "²")],
)
def test_what_is_no_number_is_named(name: str, value: str, launched: pytest.MonkeyPatch) -> None:
    launched.setenv(name, value)
    assert refusal().startswith(f"{name} in the environment is {value!r}: start the processes with torchrun")


def test_a_rank_beyond_the_number_of_processes_is_refused(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("RANK", "2")
    assert refusal().startswith("RANK=2 of WORLD_SIZE=2: ")


@pytest.mark.parametrize("size", [None, "1"])
def test_one_process_needs_nothing_else(size: str | None, launched: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        launched.delenv(name)
    if size is not None:
        launched.setenv("WORLD_SIZE", size)
    with ranks_of_launch("cpu") as ranks:
        assert ranks.size == 1


def test_a_port_in_use_is_said(launched: pytest.MonkeyPatch, listener: socket.socket) -> None:
    launched.setenv("MASTER_PORT", str(listener.getsockname()[1]))
    assert f"MASTER_PORT={listener.getsockname()[1]}: the 2 processes did not meet" in refusal()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_who_does_not_come_is_not_waited_for_for_ever(rank: str, launched: pytest.MonkeyPatch) -> None:
    """The first has nobody to meet; the second, nobody who answers at the address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launched.setenv("MASTER_PORT", str(port))
    launched.setenv("RANK", rank)
    assert refusal().startswith(f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: the 2 processes did not meet within 1 s (")


def test_a_listener_that_never_answers_is_given_up(launched: pytest.MonkeyPatch, listener: socket.socket) -> None:
    launched.setenv("MASTER_PORT", str(listener.getsockname()[1]))
    launched.setenv("RANK", "1")
    assert "did not meet within 1 s" in refusal()


@pytest.mark.parametrize(("name", "value"), [("MASTER_ADDR", "no.such.host.invalid"), ("MASTER_PORT", "99999")])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_place_that_is_none_is_said(rank: str, name: str, value: str, launched: pytest.MonkeyPatch) -> None:
    launched.setenv(name, value)
    launched.setenv("RANK", rank)
    assert f"{name}={value}" in refusal()
