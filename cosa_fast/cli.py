"""What the command lines share: their arguments, how errors reach the user, what signals do, and how networks are
named."""

import argparse
import atexit
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

from cosa_fast.config.parsing import settings_named
from cosa_fast.errors import QuietError, UserError, first_line, hint
from cosa_fast.run.signals import STOPPING, ended_at_once

# What --network may say. ON is the student of checkpoints and results.json, AN the teacher.
NETWORKS = {"on": "on", "an": "an", "student": "on", "teacher": "an"}


def run_cli(main: Callable[[list[str]], int]) -> int:
    """Run `main(argv)`; a UserError becomes one line on stderr and exit status 2 (`--debug` shows the traceback
    instead). So does what the machine refuses: a full disk, a place that cannot be written. SIGTERM and Ctrl-C end the
    process as run/signals.py says."""
    argv = sys.argv[1:]
    debug = "--debug" in argv
    # Nobody is interested in what the interpreter was tidying up when a signal came.
    for number in STOPPING:
        atexit.register(signal.signal, number, signal.SIG_IGN)
    try:
        with ended_at_once():
            status = main([argument for argument in argv if argument != "--debug"])
            sys.stdout.flush()
            return status
    except UserError as error:
        if debug:
            raise
        if not isinstance(error, QuietError):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output (head, less) has gone. The interpreter's last flush would fail, too.
        _discard_output()
        return 1
    except KeyboardInterrupt:
        print("stopped by a signal", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        if debug:
            raise
        print(f"error: {first_line(error)}; give more room or another place", file=sys.stderr)
        _discard_output()
        return 2


def _in_one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Also for Ctrl-C while a door is still importing what it needs."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by a signal", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def _unless_by_a_signal(unraisable: "sys.UnraisableHookArgs") -> None:
    """What `Stopped` met in a destructor needs no answer: the run knows of its signal."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _unless_of_the_disk(failure: threading.ExceptHookArgs) -> None:
    """What TensorBoard's thread cannot write is raised where the next figures are handed to it."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


sys.excepthook = _in_one_line
threading.excepthook = _unless_of_the_disk
sys.unraisablehook = _unless_by_a_signal


def _discard_output() -> None:
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class CommandLine(argparse.ArgumentParser):
    """A door's arguments. Whatever is wrong with them is a UserError: one line, with the nearest name that there is, in
    place of argparse's usage; and so is an option that would have no effect beside the others, as `add_argument` is
    told. Every door has --debug, which `run_cli` obeys."""

    def __init__(self, **settings: Any) -> None:
        self._beside: dict[str, tuple[str, str, str]] = {}
        super().__init__(**settings)
        self.register("type", int, _whole_number)
        self.register("type", float, _number)
        self.add_argument("--debug", action="store_true", help="show tracebacks of errors")

    def add_argument(
        self, *names: Any, needs: str = "", excludes: str = "", short_for: str = "", **settings: Any
    ) -> argparse.Action:
        """As argparse, which takes a positional of any number for a required one, unless it has a default.

        needs: the option without which this one has no effect. excludes: that which contradicts it. short_for: the
        setting, SECTION.KEY, that it stands for."""
        if settings.get("nargs") == "*" and not names[0].startswith("-"):
            settings.setdefault("default", [])
        action = super().add_argument(*names, **settings)
        self._beside[names[0]] = needs, excludes, short_for
        return action

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """As argparse; but an unknown option is told before the required one that it was meant to be."""
        words = sys.argv[1:] if args is None else [*args]
        options = words[: words.index("--")] if "--" in words else words
        self._require_effect({self._option(word) for word in options}, words)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise UserError(f"{message.removeprefix('argument ')}; all options: {self.prog} --help")

    def _require_effect(self, given: set[str | None], words: Sequence[str]) -> None:
        """UserError for an option of `given` that has no effect beside the others."""
        for option, (needs, excludes, setting) in self._beside.items():
            if option not in given:
                continue
            if needs and needs not in given:
                raise UserError(f"{option}: has no effect without {needs}; add that, or leave {option} out")
            if excludes in given:
                raise UserError(f"{option} and {excludes} contradict each other; leave one of them out")
            if setting and any(setting in settings_named(word) for word in words if is_setting(word)):
                raise UserError(f"{option} and {setting}=... are one setting; leave one of them out")

    def _option(self, word: str) -> str | None:
        """The option that a word names, perhaps in short, under its first name; None for other words. UserError for an
        unknown one."""
        name, _, value = word.partition("=")
        if name in ("", "-") or name[0] != "-" or " " in name or re.match(r"-\.?\d", name):
            return None
        known = self._option_string_actions
        for option in (name, *known, *([name[:2]] if name[1] != "-" else [])):
            if option in known and (option.startswith(name) or option == name[:2]):
                return known[option].option_strings[0]
        if re.fullmatch(r"-+\w+\.\w+", name):
            setting = f"{name.lstrip('-')}={value or '...'}"
            raise UserError(f"unknown option {name}: settings are written without dashes, {setting}")
        raise UserError(f"unknown option {name}{hint(name, known)}; all options: {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = [*map(str, action.choices or ())]
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(
                action, f"{value!r} is none of {', '.join(choices)}{hint(str(value), choices)}"
            )


def whole(least: int) -> Callable[[str], int]:
    """The type of an option: a whole number of at least that."""

    def read(text: str) -> int:
        with suppress(ValueError):
            if (value := int(text)) >= least:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} up")

    return read


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def is_setting(text: str) -> bool:
    """Whether a word is a setting, key=value, where files may stand as well."""
    return "=" in text and not os.path.exists(text)


def add_crf_side(parser: CommandLine) -> None:
    """The option --crf-side."""
    parser.add_argument(
        "--crf-side",
        type=whole(16),
        metavar="PIXELS",
        needs="--crf",
        help="longer images are shrunk to this for the CRF; 'ours' sums over all pairs of pixels, which a CPU can only "
        "do for small images",
    )


def add_network(parser: CommandLine, default: str = "an", *more: str) -> None:
    """The option --network, None where it is not given; `default` is told. more: what it may say besides."""
    parser.add_argument("--network", choices=(*NETWORKS, *more), help=f"default: {default}")


def require_two_networks(given: str | None, files: str, single: bool) -> None:
    """UserError for a --network where one network stands for both, so that there is nothing to choose."""
    if given is not None and single:
        raise UserError(f"--network {given}: has no effect, there is one network alone in {files}; leave it out")
