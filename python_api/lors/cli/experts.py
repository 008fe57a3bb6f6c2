"""Commands on expert files: decompose, add, remove, export-lora."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..command import Inputs, Json, Output, Quiet, Settings, as_options
from ..errors import print_lines
from .options import Backend, Exclude, Include, Threads
from .show import tell_report


def decompose(
    base: Annotated[str, typer.Argument(help="Base checkpoint: directory, file or hub id.")],
    expert: Annotated[str, typer.Argument(help="Fine-tuned checkpoint.")],
    *,
    rank: Annotated[float, Settings(help="Singular triplets stored; below 1 a fraction of min(m, n).")] = 7,
    density: Annotated[float, Settings(help="Share of the remaining entries stored.")] = 0.2,
    values: Annotated[str, Settings(help="Type of the sparse part: float32, float16 or bfloat16.")] = "float16",
    index: Annotated[str, Settings(help="Its places: mask, gaps, or auto (the smaller).")] = "auto",
    remainder: Annotated[
        str, Settings(help="Tensors that are not decomposed: float32, float16, int8 or none.")
    ] = "float16",
    name: Annotated[str | None, Inputs(help="What the expert is called (default: its directory).")] = None,
    include: Include = None,
    exclude: Exclude = None,
    seed: Annotated[int, Settings(metavar="N", min=0, help="Of the decomposition.")] = 0,
    backend: Backend = None,
    threads: Threads = None,
    out: Annotated[str, Output("--out", "-o", metavar="FILE", help="File to write, such as ca.lors.safetensors.")],
    force: Annotated[bool, Output("--force", help="Replace FILE.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Store an expert as low rank plus sparse, in a fraction of its size; `merge`, `add` and `remove` take it."""
    from ..experts.decompose import decompose as run

    target = {"include": include or [], "exclude": exclude or []} if include or exclude else None
    with as_options(lambda: {"target.include": "--include", "target.exclude": "--exclude"}):
        done = run(
            base, expert, out, rank=rank, density=density, values=values, index=index, remainder=remainder, name=name,
            target=target, seed=seed, backend=backend, threads=threads, force=force,
        )  # fmt: skip
    if as_json:
        print(json.dumps(done.to_dict(), indent=2))
    elif not quiet:
        print_lines(
            f"{done.path}: {done.bytes / 1e6:.1f} MB, {100 * done.share:.1f} % of the checkpoint; {done.matrices} matrices "
            f"decomposed, stored to {done.error:.1e} of the update's norm, {done.seconds:.2f} s"
        )


def add(
    merged: Annotated[str, typer.Argument(help="Directory written by `lors merge`.")],
    expert: Annotated[str, typer.Argument(help="Expert file of the same base.")],
    name: Annotated[str | None, Inputs(help="What to call it (default: its own name).")] = None,
    weight: Annotated[float | None, Settings(help="Its factor (default: the recipe's).")] = None,
    backend: Backend = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add one expert to a merged model, in place and in one step."""
    from ..merging.edit import edit

    tell_report(
        edit(merged, expert, name=name, weight=weight, backend=backend, threads=threads), as_json=as_json, quiet=quiet
    )


def remove(
    merged: Annotated[str, typer.Argument(help="Directory written by `lors merge`.")],
    expert: Annotated[str, typer.Argument(help="Expert file that was merged, or made from the checkpoint that was.")],
    name: Annotated[str | None, Inputs(help="Which one, when it is in the model twice.")] = None,
    backend: Backend = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take one expert out of a merged model, in place and in one step."""
    from ..merging.edit import edit

    tell_report(
        edit(merged, expert, remove=True, name=name, backend=backend, threads=threads), as_json=as_json, quiet=quiet
    )


def export_lora(
    expert: Annotated[str, typer.Argument(help="Expert file.")],
    *,
    base: Annotated[str | None, Inputs(help="What PEFT shall call the base model: a hub id or a path.")] = None,
    scale: Annotated[float, Settings(help="Factor of L, such as lambda.")] = 1.0,
    out: Annotated[str, Output("--out", "-o", metavar="DIR", help="Adapter directory to write.")],
    force: Annotated[bool, Output("--force", help="Replace DIR.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the low-rank part of an expert as a PEFT LoRA adapter."""
    from ..experts.lora import export_lora as run

    matrices = run(expert, out, base=base, scale=scale, force=force)
    if as_json:
        print(json.dumps({"out": out, "matrices": matrices}))
    elif not quiet:
        print_lines(f"{out}: {matrices} matrices")
