"""The one exception a user sees, and the one function for text that goes to a terminal."""

from __future__ import annotations

from .public import public_text

__all__ = ["LorsError", "LorsWarning", "SettingError", "printable"]

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
