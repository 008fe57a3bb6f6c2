"""Commands on expert files: decompose, add, remove, export-lora."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..command import as_options
from ..errors import print_lines
from .options import Backend, Exclude, Include, Json, ReportJson, Threads
from .show import tell_report


def decompose(
    base: Annotated[str, typer.Argument(help="Base checkpoint: directory, file or hub id.")],
    expert: Annotated[str, typer.Argument(help="Fine-tuned checkpoint.")],
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="File to write, such as ca.lors.safetensors.")
    ],
    rank: Annotated[float, typer.Option(help="Singular triplets stored; below 1 a fraction of min(m, n).")] = 7,
    density: Annotated[float, typer.Option(help="Share of the remaining entries stored.")] = 0.2,
    values: Annotated[str, typer.Option(help="Type of the sparse part: float32, float16 or bfloat16.")] = "float16",
    index: Annotated[str, typer.Option(help="Its places: mask, gaps, or auto (the smaller).")] = "auto",
    remainder: Annotated[
        str, typer.Option(help="Tensors that are not decomposed: float32, float16, int8 or none.")
    ] = "float16",
    name: Annotated[str | None, typer.Option(help="What the expert is called (default: its directory).")] = None,
    include: Include = None,
    exclude: Exclude = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the decomposition.")] = 0,
    backend: Backend = None,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
    as_json: Json = False,
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
    else:
        print_lines(
            f"{done.path}: {done.bytes / 1e6:.1f} MB, {100 * done.share:.1f} % of the checkpoint; {done.matrices} matrices "
            f"decomposed, stored to {done.error:.1e} of the update's norm, {done.seconds:.2f} s"
        )


def add(
    merged: Annotated[str, typer.Argument(help="Directory written by `lors merge`.")],
    expert: Annotated[str, typer.Argument(help="Expert file of the same base.")],
    name: Annotated[str | None, typer.Option(help="What to call it (default: its own name).")] = None,
    weight: Annotated[float | None, typer.Option(help="Its factor (default: the recipe's).")] = None,
    backend: Backend = None,
    threads: Threads = None,
    as_json: ReportJson = False,
) -> None:
    """Add one expert to a merged model, in place and in one step."""
    from ..merging.edit import edit

    tell_report(edit(merged, expert, name=name, weight=weight, backend=backend, threads=threads), as_json)


def remove(
    merged: Annotated[str, typer.Argument(help="Directory written by `lors merge`.")],
    expert: Annotated[str, typer.Argument(help="Expert file that was merged, or made from the checkpoint that was.")],
    name: Annotated[str | None, typer.Option(help="Which one, when it is in the model twice.")] = None,
    backend: Backend = None,
    threads: Threads = None,
    as_json: ReportJson = False,
) -> None:
    """Take one expert out of a merged model, in place and in one step."""
    from ..merging.edit import edit

    tell_report(edit(merged, expert, remove=True, name=name, backend=backend, threads=threads), as_json)


def export_lora(
    expert: Annotated[str, typer.Argument(help="Expert file.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Adapter directory to write.")],
    base: Annotated[str | None, typer.Option(help="What PEFT shall call the base model: a hub id or a path.")] = None,
    scale: Annotated[float, typer.Option(help="Factor of L, such as lambda.")] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR.")] = False,
) -> None:
    """Write the low-rank part of an expert as a PEFT LoRA adapter."""
    from ..experts.lora import export_lora as run

    print_lines(f"{out}: {run(expert, out, base=base, scale=scale, force=force)} matrices")
