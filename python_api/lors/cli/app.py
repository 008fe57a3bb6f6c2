"""The `lors` command. Of the sub-commands only the one that is named is imported, and what it needs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, Any

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
    "calibrate": ".calibrate",
    "learn": ".learn",
    "sweep": ".sweep",
    "report": ".analysis",
    **dict.fromkeys(("synth", "finetune", "evaluate", "experiment"), _SPEECH),
}
_OPTIONS: dict[str, dict[str, Any]] = {  # mergekit reads its own
    "mergekit-yaml": {
        "add_help_option": False,
        "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    },
}


def main() -> None:
    """Entry point."""
    name = next(iter(sys.argv[1:]), "")
    run(application([name] if name in COMMANDS else COMMANDS))


def application(names: Iterable[str]) -> typer.Typer:
    """The application with some of its sub-commands."""
    made = typer.Typer(
        name="lors",
        help="Merge fine-tuned Whisper experts into one model: low rank plus sparse, at file speed.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback(invoke_without_command=True)(_root)
    for name in names:
        function = getattr(import_module(COMMANDS[name], __package__), name.replace("-", "_"))
        made.command(name, **_OPTIONS.get(name, {}))(function)
    return made


def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from .. import __version__

        print(f"lors {__version__}")
        raise typer.Exit
