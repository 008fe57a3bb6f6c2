"""The `lors` command. Only this folder and what a sub-command needs is imported, so that `lors --help` is instant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..command import run
from ..errors import LorsError, SettingError
from ..speech.commands import COMMANDS as SPEECH_COMMANDS
from .analysis import inspect, report
from .experts import add, decompose, export_lora, remove
from .kernels import doctor, validate
from .merge import merge, mergekit_yaml
from .sweep import sweep

app = typer.Typer(
    name="lors",
    help="Merge fine-tuned Whisper experts into one model: low rank plus sparse, at file speed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point."""
    run(app)


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from .. import __version__

        print(f"lors {__version__}")
        raise typer.Exit


def bench(
    backend: Annotated[
        list[str] | None, typer.Option(help="Only this backend; repeat (default: all that are available).")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Matrices of this model's shapes (default: two of whisper-small).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, float16 or bfloat16.")] = "float32",
    rank: Annotated[int, typer.Option(min=1, help="Of the low-rank part.")] = 7,
    density: Annotated[float, typer.Option(help="Share of entries kept of the rest.")] = 0.2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time every kernel operation here, beside plain torch and against the peaks of this machine; exit code 1 if one is
    wrong.

    Half a minute on two cores. LORS_THREADS sets the threads, of torch too.
    """
    from lors_kernels import BackendUnavailable
    from lors_kernels.testing.bench import DEFAULT_SHAPES, bench_command

    shapes = list(DEFAULT_SHAPES.values()) if checkpoint is None else _decomposed_shapes(checkpoint)
    try:
        right = bench_command(backend, shapes=shapes, dtype=dtype, rank=rank, density=density, as_json=as_json)
    except (BackendUnavailable, ValueError) as error:
        name, _, problem = str(error).partition(": ")
        known = name in ("backend", "dtype", "rank", "density")
        raise SettingError(name if known else "backend", problem if known else str(error)) from None
    if not right:
        raise typer.Exit(1)


def _decomposed_shapes(source: str) -> list[tuple[int, int]]:
    """Of the matrices of this checkpoint that a merge decomposes, the smallest first."""
    from ..checkpoints.layers import select
    from ..checkpoints.reader import open_checkpoint

    with open_checkpoint(source) as model:
        chosen = select(model.tensors, model.naming, model.config).names
        shapes = {(rows, columns) for rows, columns in (model.tensors[name].shape for name in chosen)}
    if not shapes:
        raise LorsError(f"{source}: no decomposed matrix")
    return sorted(shapes, key=lambda shape: shape[0] * shape[1])


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
for _name, _command in COMMANDS.items():
    app.command(_name, **_OPTIONS.get(_name, {}))(_command)
