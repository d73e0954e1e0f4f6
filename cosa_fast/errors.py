"""Mistakes that a user can cause and mend: their exception, and the wording that all messages share. Anything may
import this file; it imports nothing of the project."""

from collections.abc import Collection
from difflib import SequenceMatcher, get_close_matches
from pathlib import PurePath

LONGEST_MESSAGE = 500
# Letters of a name that say which longer ones may be meant.
_TELLING = 5


class UserError(Exception):
    """Bad input: the message is one line that names the file, key or value, and the remedy.

    Command lines print it without a traceback and exit with status 2. Whatever the input that a message quotes, it
    stays one line of at most 500 characters, its middle left out, and no character in it commands a terminal.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_without_middle("".join(map(_printable, _without_middle(message)))))


class QuietError(UserError):
    """An error that another process of the same run has already told the user of."""


def hint(name: str, known: Collection[str], prefix: str = "") -> str:
    """ " (did you mean 'X'?)" for the nearest known name, or the shortest of the longer ones that begin most like it,
    shown behind `prefix`; or nothing."""
    ending = PurePath(name).suffix.lower()  # that two files share one makes them no more alike
    lowered = {candidate.lower().removesuffix(ending): candidate for candidate in known}
    given = name[:100].lower().removesuffix(ending)  # the search takes time with the square of the lengths
    longer = sorted(
        (each for each in lowered if len(each) > len(given) >= _TELLING), key=lambda each: (len(each), each)
    )[::-1]
    beginnings = {each[: len(given)]: each for each in longer}
    near = [(each, each) for each in get_close_matches(given, lowered, n=1, cutoff=0.6)]
    near += [(each, beginnings[each]) for each in get_close_matches(given, beginnings, n=1, cutoff=0.8)]
    best = max(near, key=lambda pair: SequenceMatcher(None, pair[0], given).ratio(), default=None)
    return f" (did you mean {prefix + lowered[best[1]]!r}?)" if best else ""


def counted(count: int, what: str, plural: str = "s") -> str:
    """ "1 image", "3 images", "2 classes" (plural: "es")."""
    return f"{count} {what}{plural * (count != 1)}"


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's message, at most `limit` characters of it; its type's name if it has none."""
    lines = str(error).strip().splitlines()
    return _shortened(lines[0] if lines else type(error).__name__, limit)


def one_line(error: BaseException, limit: int = 300) -> str:
    """A message of several lines as one, at most `limit` characters of it: where the first line alone says nothing."""
    return _shortened(str(error) or type(error).__name__, limit)


def _without_middle(text: str) -> str:
    half = LONGEST_MESSAGE // 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[: half - 1]}…{text[-half:]}"


def _printable(letter: str) -> str:
    if letter.isprintable():
        return letter
    return " " if letter.isspace() else ascii(letter)[1:-1]


def _shortened(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
