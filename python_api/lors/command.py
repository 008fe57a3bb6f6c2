"""Runs a command, and ends it when something is wrong: one line on stderr and an exit code, whatever it was.

2 for all that a user can put right and for what nobody foresaw (``LORS_TRACEBACK=1`` shows that whole), 130 for Ctrl-C, 1
for a reader of the output that went away. A wrong option is told like a wrong input: where, expected, got.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import typer

from .console import tell
from .errors import LorsError, SettingError, first_line
from .files.signals import Terminated

__all__ = [
    "Inputs",
    "Json",
    "Machine",
    "Output",
    "Quiet",
    "Settings",
    "as_options",
    "explained",
    "hushed",
    "one_line_errors",
    "run",
]

# Options of the groups that help shows them in, and the two that every command has.
Inputs, Settings, Machine, Output = (
    partial(typer.Option, rich_help_panel=name) for name in ("Inputs", "Settings", "Machine", "Output")
)
Json = Annotated[bool, Output("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, Output("--quiet", "-q", help="Print nothing but errors, and JSON where asked for.")]


def run(command: typer.Typer) -> None:
    """Runs a command: what is wrong is one line, and the exit code says the kind of it."""
    from .console import standard_streams
    from .files.signals import terminate_cleanly

    atexit.register(_leave_memory)
    with one_line_errors(), terminate_cleanly(), standard_streams(), as_options(lambda: _own_options(command)):
        status = command(prog_name="lors", standalone_mode=False)
        if status == 130:  # how the library hands Ctrl-C on
            raise KeyboardInterrupt
        if status:
            raise SystemExit(status)


@contextlib.contextmanager
def hushed(quiet: bool) -> Iterator[None]:
    """What the block prints goes nowhere, with --quiet, or where the result is to be the only thing on stdout."""
    if not quiet:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _leave_memory() -> None:
    """What is there at the end goes with the process: the interpreter would free it one by one, a tenth of a small command.

    Not under torch: Triton's bindings complain on stderr of what was not freed.
    """
    if "torch" not in sys.modules:
        gc.freeze()


def _own_options(app: typer.Typer) -> dict[str, str]:
    """Argument -> option of the command that is run."""
    command = typer.main.get_command(app).commands.get(next(iter(sys.argv[1:]), ""))  # type: ignore[attr-defined]
    names = [name for option in command.params for name in option.opts] if command else []
    return {name[2:].replace("-", "_"): name for name in names}


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a command: what it raises ends the process as above."""
    try:
        yield
    except Terminated as error:
        tell(f"terminated by {error.name}")
        raise
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except BrokenPipeError:
        _end(None, 1)
    except Exception as error:
        if type(error).__name__ == "Abort":  # Ctrl-C, by the library that reads the command line
            _end("interrupted", 130)
        if os.environ.get("LORS_TRACEBACK") == "1":
            traceback.print_exc()
        _end(explained(error), 2)


def explained(error: Exception) -> str | None:
    """The line for an exception; None when all is said (the help of a command without arguments)."""
    if isinstance(error, LorsError):
        text = str(error)
    elif hasattr(error, "format_message"):  # by the library that reads the command line
        text = _usage(error)
    else:
        text = str(LorsError(_unforeseen(error)))  # on one line
    return f"error: {text}" if text else None


@contextlib.contextmanager
def as_options(options: Callable[[], Mapping[str, str]]) -> Iterator[None]:
    """Errors of the block about a setting name the option that gave it; `options()`: key of the setting -> option."""
    try:
        yield
    except SettingError as error:
        known = options()
        option = known.get(re.sub(r"\[\d+\]$", "", error.key)) or known.get(error.key)
        if option is None:
            raise
        raise LorsError(f"{option}: {error.problem}") from error


def _end(line: str | None, status: int) -> None:
    if line is not None:
        tell(line)
    raise SystemExit(status)


# --- wrong options ---------------------------------------------------------------------------------------------------

# How the library words what it expected of a number -> how we do; its wording differs from version to version.
_EXPECTED = (
    (r".*(valid number|valid float|valid decimal).*", "a number"),
    (r".*(valid integer|valid int\b).*", "an integer"),
    (r".*greater than or equal to (\S+)", r"at least \1"),
    (r".*not in the range x>=(\S+?)\.?", r"at least \1"),
)


def _usage(error: Any) -> str:
    kind = type(error).__name__
    if kind == "NoArgsIsHelpError":
        return ""
    command = getattr(getattr(error, "ctx", None), "command_path", None) or "lors"
    if kind == "NoSuchOption":
        near = f", did you mean {error.possibilities[0]}?" if error.possibilities else f"; see {command} --help"
        return f"{command}: unknown option {error.option_name}{near}"
    if kind == "BadParameter" and getattr(error, "param", None) is not None:
        return f"{error.param.opts[0]}: {_expected(error.message, error.param.opts)}"
    if kind == "MissingParameter" and getattr(getattr(error, "param", None), "param_type_name", "") == "option":
        return f"{command}: missing option {next(name for name in error.param.opts if name[:2] == '--')}; see {command} --help"
    text = error.format_message().strip().rstrip(".")
    text = re.sub(r"\. Did you mean (.*)$", r", did you mean \1", text)
    text = re.sub(r"^Missing (\w+) '(.*)'$", r"missing \1 \2", text)
    text = re.sub(
        r"^Got unexpected extra argument(?:\(s\)|s)? \((.*)\)$", r"expected no further argument, got \1", text
    )
    hint = "" if text.endswith("?") else f"; see {command} --help"
    return f"{command}: {text[:1].lower()}{text[1:]}{hint}"


def _expected(message: str, names: Sequence[str]) -> str:
    got = next((value for value in _given(names)), None)
    for pattern, wanted in _EXPECTED:
        if found := re.fullmatch(pattern, message.strip()):
            return f"expected {found.expand(wanted)}" + ("" if got is None else f", got {got!r}")
    return message


def _given(names: Sequence[str]) -> Iterator[str]:
    """What the command line says for an option; the library's errors do not tell."""
    for index, word in enumerate(sys.argv):
        name, equals, value = word.partition("=")
        if name in names and equals:
            yield value
        elif name in names and index + 1 < len(sys.argv):
            yield sys.argv[index + 1]


# --- the last resort -------------------------------------------------------------------------------------------------


def _unforeseen(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "out of memory; fewer --threads, or jobs at a time, need less"
    if isinstance(error, RecursionError):
        return "something in the input is nested too deeply"
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return "the system does not allow so many threads; give fewer --threads"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or error} (LORS_TRACEBACK=1 shows where)"
    return f"{type(error).__name__}: {first_line(error)} (LORS_TRACEBACK=1 shows where)"
