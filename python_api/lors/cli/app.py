"""The `lors` command. Of the sub-commands only the one that is named is imported, and what it needs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated

import typer

from ..command import run

_SPEECH = "..speech.commands"
COMMANDS = {  # sub-command -> the module that has its function, which bears its name
    "merge": ".merge",
    "inspect": ".analysis",
    "doctor": ".kernels",
    "validate": ".kernels",
    "bench": ".kernels",
    "mergekit-yaml": ".merge",
    "decompose": ".experts",
    "add": ".experts",
    "remove": ".experts",
    "export-lora": ".experts",
    "export": ".export",
    "calibrate": ".calibrate",
    "learn": ".learn",
    "sweep": ".sweep",
    "report": ".analysis",
    **dict.fromkeys(("synth", "finetune", "evaluate", "experiment"), _SPEECH),
}


def main() -> None:
    """Entry point."""
    name = next(iter(sys.argv[1:]), "")
    run(application([name]) if name in COMMANDS else application(COMMANDS, complete=True))


def application(names: Iterable[str], complete: bool = False) -> typer.Typer:
    """The application with some of its sub-commands. complete: it completes them in a shell, too."""
    made = typer.Typer(
        name="lors",
        help="Merge fine-tuned Whisper experts into one model: low rank plus sparse, at file speed.",
        no_args_is_help=True,
        add_completion=complete,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback(invoke_without_command=True)(_root)
    for name in names:
        module = import_module(COMMANDS[name], __package__)
        made.command(name, **getattr(module, "OPTIONS", {}).get(name, {}))(getattr(module, name.replace("-", "_")))
    return made


def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from .. import __version__

        print(f"lors {__version__}")
        raise typer.Exit
