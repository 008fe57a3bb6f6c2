"""The one exception a user sees, and what its messages are made of: safe text, a value in short, the nearest name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from .public import public_text

__all__ = [
    "LorsError",
    "LorsWarning",
    "SettingError",
    "first_line",
    "near_path",
    "nearest",
    "print_lines",
    "printable",
    "shown",
]

_LONGEST = 1500  # characters of a message


def printable(text: str) -> str:
    """`text` on one line, safe for a terminal: what cannot be seen is escaped as in a Python string.

    Names in files, paths and the output of other programs may hold terminal commands (ESC, C1 controls), line breaks,
    marks that reverse the order of what follows, and halves of surrogate pairs, which cannot be encoded. Letters of
    every script, spaces and backslashes stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class LorsError(Exception):
    """Something the user can put right: what, where, what was expected, what was found, in one line.

    The command line prints ``error: <message>`` and exits with 2. The message is `printable`, one line whatever a path or
    a tensor name contains, and its URLs are `public`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class LorsWarning(UserWarning):
    """Something that the user should know of a result that is in place all the same, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def _one_line(message: str) -> str:
    # cut before escaping too: a name of 100 MB would take gigabytes
    return _cut(printable(_cut(public_text(message))))


class SettingError(LorsError):
    """A LorsError about one setting: an argument, or a key of a recipe. The command line names the option instead.

    key: as in a recipe, such as `parameters.rank`. problem: the message without it.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key, self.problem = key, problem

    def __reduce__(self) -> tuple[type[SettingError], tuple[str, str]]:
        return SettingError, (self.key, self.problem)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 300]} [...] {text[-290:]}"


def shown(value: object, inner: bool = False) -> str:
    """A user's value as one short line: what it is when it is large or nested, itself when it is small."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        plain = not inner and len(value) <= 8
        return f"[{', '.join(shown(item, True) for item in value)}]" if plain else f"a list of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to write the largest ones
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(name: object, known: Iterable[str]) -> str:
    """End of a message about an unknown name: ``, did you mean 'x'?``, or all there is when nothing is near."""
    names = list(known)
    lower = {one.lower(): one for one in names}
    close = difflib.get_close_matches(str(name).lower(), lower, n=1)
    start = f"{str(name).lower()}_"  # as `base` is of base_model
    begun = [one for one in lower if len(start) > 3 and one.startswith(start)]
    close = close or (begun if len(begun) == 1 else [])
    return f", did you mean {lower[close[0]]!r}?" if close else f"; known: {', '.join(names) or 'none'}"


def near_path(text: str, places: Iterable[Path] = (Path(),)) -> str:
    """End of a message about a path that is not there: ``, did you mean 'x'?`` when there is one of nearly that name."""
    for place in places:
        wanted = place / (given := Path(os.path.expanduser(text)))
        missing = wanted
        while missing != missing.parent and not os.path.lexists(missing.parent):
            missing = missing.parent
        try:
            there = os.listdir(missing.parent)
        except OSError:
            continue
        for name in difflib.get_close_matches(missing.name, there, cutoff=0.75):
            found = missing.with_name(name) / wanted.relative_to(missing)
            if found.exists():
                return f", did you mean {str(found if given.is_absolute() else found.relative_to(place))!r}?"
    return ""


def print_lines(*lines: str) -> None:
    """Prints lines for the user. Names of files, tensors and experts are in them: each is one line, whatever they hold."""
    for line in lines:
        print(printable(line), flush=True)


def first_line(error: BaseException) -> str:
    """What a library's error says, without the lines of advice that follow; its type when it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
