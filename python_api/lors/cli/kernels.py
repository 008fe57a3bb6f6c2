"""Commands on the kernels alone: doctor, validate, bench."""

from __future__ import annotations

from typing import Annotated

import typer

from ..command import Inputs, Json, Quiet, Settings, hushed
from ..errors import LorsError, SettingError
from .options import Backends


def doctor(as_json: Json = False, quiet: Quiet = False) -> None:
    """Backends, each available or why not; threads, versions. Exit code 1 if something is broken or misconfigured."""
    from lors_kernels.__main__ import print_diagnosis

    with hushed(quiet and not as_json):
        right = print_diagnosis(as_json=as_json)
    if not right:
        raise typer.Exit(1)


def validate(
    backend: Backends = None,
    quick: Annotated[bool, Settings("--quick", help="Leave out the matrices of real size.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check every kernel operation against its definition on this machine; exit code 1 if one is wrong or none is there."""
    from lors_kernels import BackendUnavailable
    from lors_kernels.testing.validate import validate_command

    try:
        with hushed(quiet and not as_json):
            right = validate_command(backend, quick=quick, as_json=as_json)
    except (BackendUnavailable, ValueError) as error:
        raise SettingError("backend", str(error).removeprefix("backend: ")) from None
    if not right:
        raise typer.Exit(1)


def bench(
    backend: Backends = None,
    checkpoint: Annotated[
        str | None, Inputs(help="Matrices of this model's shapes (default: two of whisper-small).")
    ] = None,
    dtype: Annotated[str, Settings(help="Of the weights: float32, float16 or bfloat16.")] = "float32",
    rank: Annotated[int, Settings(metavar="N", min=1, help="Of the low-rank part.")] = 7,
    density: Annotated[float, Settings(help="Share of entries kept of the rest.")] = 0.2,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time every kernel operation here, beside plain torch and against the peaks of this machine; exit code 1 if one is
    wrong.

    LORS_THREADS sets the threads, of torch too. The reference takes most of the time: `--backend cpu` is quicker.
    """
    from lors_kernels import BackendUnavailable
    from lors_kernels.testing.bench import DEFAULT_SHAPES, bench_command

    shapes = list(DEFAULT_SHAPES.values()) if checkpoint is None else _decomposed_shapes(checkpoint)
    try:
        with hushed(quiet and not as_json):
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
