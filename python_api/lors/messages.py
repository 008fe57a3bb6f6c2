"""Words that every message about a user's input is made of: the value in short, the nearest known name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from .errors import printable

__all__ = ["first_line", "near_path", "nearest", "print_lines", "shown"]


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
