"""What SIGTERM and Ctrl-C do: within a step, and everywhere else."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cosa_fast.run.signals import Signals, Stopped

REPOSITORY = Path(__file__).resolve().parents[2]
NUMBERS = [signal.SIGTERM, signal.SIGINT]
# Its main thread is in C, and would not be back for a minute.
WAITS = """
import ctypes, sys
from pathlib import Path
from cosa_fast.files import written_aside
from cosa_fast.run.signals import ended_at_once, resumable, told
with ended_at_once(), resumable(lambda: "saved" in sys.argv), written_aside(Path(sys.argv[1])) as aside:
    aside.write_text("half")
    if "told" in sys.argv:
        told()
    print("ready", flush=True)
    ctypes.CDLL(None).poll(None, 0, 60000)
    ctypes.CDLL(None).poll(None, 0, 60000)
"""


def end(process: "subprocess.Popen[str]", *numbers: int) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a process that gets these signals in a row."""
    for number in numbers:
        process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    return process.returncode, output, errors


def start(program: str, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=REPOSITORY, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("saved", "environment", "line"),
    [
        (False, {}, "stopped by a signal\n"),
        (True, {}, "stopped by a signal; go on with --resume auto\n"),
        (True, {"RANK": "0", "WORLD_SIZE": "2"}, "stopped by a signal; go on with --resume auto\n"),
        (True, {"RANK": "1", "WORLD_SIZE": "2"}, ""),
    ],
    ids=["nothing saved", "saved", "one of two", "the other of two"],
)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_command_line_ends_at_once_also_in_a_library_s_long_wait(
    number: int, saved: bool, environment: dict[str, str], line: str, tmp_path: Path
) -> None:
    process = start(WAITS, str(tmp_path / "file"), *["saved"] * saved, **environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    alone = "RANK" not in environment
    assert end(process, number, number) == (0 if saved and alone else 128 + number, "", line)
    assert list(tmp_path.iterdir()) == []


def test_a_further_signal_ends_what_has_said_so_already_without_a_second_line(tmp_path: Path) -> None:
    process = start(WAITS, str(tmp_path / "file"), "saved", "told")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert end(process, signal.SIGTERM) == (0, "", "")


@pytest.mark.parametrize("number", NUMBERS)
def test_the_command_line_obeys_while_it_imports(number: int, tmp_path: Path) -> None:
    """The signal comes when torch is being imported, which takes seconds."""
    program = """
import builtins, runpy, sys
build = builtins.__import__
def told(name, *rest, **named):
    if name == "torch":
        print("importing", flush=True)
        builtins.__import__ = build
    return build(name, *rest, **named)
builtins.__import__ = told
sys.argv = ["train", "demo.yaml"]
runpy.run_module("cosa_fast.train", run_name="__main__", alter_sys=False)
"""
    process = start(program)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    time.sleep(0.2)
    assert end(process, number) == (128 + number, "", "stopped by a signal\n")


@pytest.fixture
def python_s_own_handler() -> Iterator[Any]:
    """As on a terminal; a shell's background processes ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_in_a_step_a_signal_is_noted_and_elsewhere_it_means_what_it_meant(python_s_own_handler: Any) -> None:
    signals, before = Signals(), python_s_own_handler
    with signals.noted():
        assert signals.received == 0
        with signals.obeyed():
            assert signal.getsignal(signal.SIGINT) is before
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt), signals.obeyed():
            pytest.fail("a signal that was noted is obeyed first")
        with pytest.raises(Stopped), signals.raised():
            pytest.fail("nor is anything waited for")
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        signals.obey()


def test_waiting_is_broken_off() -> None:
    signals = Signals()
    with signals.noted():
        with pytest.raises(Stopped), signals.raised():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert signals.received == signal.SIGTERM
