"""cosa-fast COMMAND: every door behind one name."""

import subprocess
import sys
from pathlib import Path

import pytest

from cosa_fast import __main__ as command
from cosa_fast import cli
from cosa_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def test_without_a_command_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in command.COMMANDS)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_reaches_its_door(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"])
    assert ended.value.code == 0
    assert f"cosa_fast.{name}" in capsys.readouterr().out


def test_a_misspelt_command_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"no command 'evalute' \(did you mean 'evaluate'\?\)"):
        command.main(["evalute"])
    monkeypatch.setattr("sys.argv", ["cosa-fast", "report", "nowhere"])
    assert cli.run_cli(command.main) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_the_package_installs_the_command_and_what_pages_are_made_of() -> None:
    """What the wheel is built of, without building it."""
    code = "import json, sys, setuptools; setuptools.setup = lambda **all: print(json.dumps(all['entry_points'] | "
    code += "{'data': all['package_data']['cosa_fast']})); exec(open('setup.py').read())"
    code = code.replace("exec(", "__file__ = 'setup.py'; exec(")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "cosa-fast=cosa_fast.__main__:run" in out
    for pattern in ("configs/*.yaml", "report/*.html", "report/*.md"):
        assert pattern in out
        assert list((ROOT / "cosa_fast").glob(pattern))
