"""The standard streams of a command: there, whatever its parent closed, and no result lost because one cannot be written."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from .errors import LorsError, LorsWarning, printable

__all__ = ["standard_streams", "tell"]


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Within the block three streams are open, and warnings are lines on stderr.

    A daemon's child has none of them: then the next file that is opened, the weights, would be descriptor 2, where libraries
    write their complaints. LorsError when what is printed in the block does not arrive (a full disk, a lost terminal).
    """
    _open_closed_ones()
    before = sys.stdout, warnings.showwarning
    with contextlib.suppress(OSError, AttributeError, ValueError):  # a stream without a descriptor has no such errors
        sys.stdout = _checked(sys.stdout)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        yield
        sys.stdout.flush()
    except SystemExit as error:
        if error.code in (None, 0):
            sys.stdout.flush()
        raise
    finally:
        _let_go(sys.stdout)
        sys.stdout, warnings.showwarning = before


class _Stdout(io.FileIO):
    """Standard output, its errors told from those of files."""

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise LorsError(f"standard output: cannot be written: {error.strerror or error}") from None


def _checked(stream: TextIO) -> TextIO:
    """The stream with such errors. What its encoding has not got, of names that come from outside, is escaped."""
    stream.flush()
    errors = "backslashreplace" if stream.errors == "strict" else stream.errors
    raw = _Stdout(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream.encoding, errors, None, bool(stream.line_buffering),
        bool(getattr(stream, "write_through", False)),
    )  # fmt: skip


def tell(text: str) -> None:
    """A line on stderr; where that cannot be written there is nobody to tell."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr)
    _let_go(sys.stderr)


def _let_go(stream: TextIO) -> None:
    """Flushes; what cannot be written then goes nowhere, or the interpreter would fail on it once more."""
    try:
        stream.flush()
    except (OSError, ValueError, LorsError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()


def _open_closed_ones() -> None:
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object) -> None:
    if issubclass(category, LorsWarning):
        return tell(f"note: {printable(str(message))}")
    tell(warnings.formatwarning(message, category, filename, lineno).rstrip())
