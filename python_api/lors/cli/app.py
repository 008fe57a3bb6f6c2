"""The `lors` command. Only this folder and what a sub-command needs is imported, so that `lors --help` is instant."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from ..command import run
from ..speech.commands import COMMANDS as SPEECH_COMMANDS
from .analysis import inspect, report
from .calibrate import calibrate
from .experts import add, decompose, export_lora, remove
from .kernels import bench, doctor, validate
from .merge import merge, mergekit_yaml
from .sweep import sweep


def main() -> None:
    """Entry point."""
    name = next(iter(sys.argv[1:]), "")
    run(_with({name: COMMANDS[name]}) if name in COMMANDS else app)  # of all, most of the time would go into the others


def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from .. import __version__

        print(f"lors {__version__}")
        raise typer.Exit


COMMANDS: dict[str, Callable[..., None]] = {
    "merge": merge,
    "inspect": inspect,
    "doctor": doctor,
    "validate": validate,
    "bench": bench,
    "mergekit-yaml": mergekit_yaml,
    "decompose": decompose,
    "add": add,
    "remove": remove,
    "export-lora": export_lora,
    "calibrate": calibrate,
    "sweep": sweep,
    "report": report,
    **SPEECH_COMMANDS,
}
_OPTIONS: dict[str, dict[str, Any]] = {  # mergekit reads its own
    "mergekit-yaml": {
        "add_help_option": False,
        "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    },
}


def _with(commands: Mapping[str, Callable[..., None]]) -> typer.Typer:
    """The application with some of its commands."""
    made = typer.Typer(
        name="lors",
        help="Merge fine-tuned Whisper experts into one model: low rank plus sparse, at file speed.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback(invoke_without_command=True)(_root)
    for name, command in commands.items():
        made.command(name, **_OPTIONS.get(name, {}))(command)
    return made


app = _with(COMMANDS)
