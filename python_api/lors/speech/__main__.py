"""``python -m lors.speech COMMAND``: the speech commands alone, for launchers that start a module.

accelerate launch --num_processes 4 -m lors.speech finetune --model openai/whisper-small ...  (GPUs, machines)
torchrun --nproc_per_node 4 -m lors.speech finetune --device cpu ...                          (cores: gloo)
"""

from __future__ import annotations

import typer

from ..command import run
from .commands import COMMANDS, OPTIONS


def main() -> None:
    """As `lors`, without the other commands."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    for name, command in COMMANDS.items():
        app.command(name, **OPTIONS.get(name, {}))(command)
    run(app)


if __name__ == "__main__":
    main()
