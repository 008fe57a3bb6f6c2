"""The one exception a user sees."""

from __future__ import annotations

from .public import public_text

__all__ = ["LorsError", "LorsWarning"]

# A path or a tensor name may hold any character; a message is one line all the same.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127, 0x85, 0x2028, 0x2029)}
_CONTROL.update({9: "\\t", 10: "\\n", 13: "\\r"})

_LONGEST = 1500  # characters of a message


class LorsError(Exception):
    """Something the user can put right: what, where, what was expected, what was found, in one line.

    The command line prints ``error: <message>`` and exits with 2. Control characters are escaped, so the message is
    one line whatever a path or a tensor name contains. URLs are `public`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class LorsWarning(UserWarning):
    """Something that the user should know of a result that is in place all the same, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def _one_line(message: str) -> str:
    text = public_text(message).translate(_CONTROL)
    if len(text) > _LONGEST:  # a name out of a damaged file
        text = f"{text[: _LONGEST - 300]} [...] {text[-290:]}"
    return text
