"""`lors inspect` and `lors report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..command import Inputs, Json, Machine, Output, Quiet, Settings, hushed
from ..errors import print_lines
from ..progress import bar
from .options import experts_of


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Directory, file or hub id.")],
    base: Annotated[str | None, Inputs(help="Describe the difference to this checkpoint.")] = None,
    rank: Annotated[int, Settings(metavar="N", min=1, help="Rank whose share of the energy is shown.")] = 7,
    top: Annotated[int, Settings(metavar="N", min=1, help="Singular values shown per matrix.")] = 5,
    match: Annotated[str | None, Inputs(metavar="REGEX", help="Only tensors with such names.")] = None,
    plot: Annotated[Path | None, Output(metavar="FILE.png", help="Draw the spectra (needs matplotlib).")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What is in a checkpoint; with --base, the spectrum of every task vector."""
    from ..analysis.inspect import inspect_command

    with hushed(quiet and not as_json):
        inspect_command(checkpoint, base, rank=rank, top=top, match=match, plot=plot, as_json=as_json)


def report(
    base: Annotated[str, typer.Argument(help="Base checkpoint: directory, file or hub id.")],
    experts: Annotated[list[str], typer.Argument(metavar="[NAME=]EXPERT...", help="Checkpoints or expert files.")],
    *,
    rank: Annotated[float, Settings(help="Of L; below 1 a fraction of min(m, n).")] = 7,
    density: Annotated[float, Settings(help="Of S.")] = 0.2,
    match: Annotated[str | None, Inputs(metavar="REGEX", help="Only matrices with such names.")] = None,
    threads: Annotated[int | None, Machine(metavar="N", min=1, help="CPU threads (default: all cores).")] = None,
    out: Annotated[
        Path, Output("--out", "-o", metavar="FILE.html", help="Page to write; the same as .json beside it.")
    ],
    force: Annotated[bool, Output("--force", help="Replace a report in FILE.html and FILE.json.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How experts interfere: energies, spectra, subspaces, sign conflicts, layer by layer, as one page and as JSON."""
    from ..analysis.interference import interference
    from ..analysis.interference_page import findings, output_files, render

    named = experts_of(experts, "report")
    page, data = output_files(out, force)
    with bar("measuring", quiet=quiet or as_json) as progress:
        found = interference(base, named, rank=rank, density=density, match=match, threads=threads, progress=progress)
    text = json.dumps(found.to_dict(), indent=1) + "\n"
    with page, data:
        page.write_text(render(found))
        data.write_text(text)
        data.commit()
        page.commit()
    if as_json:
        print(text, end="")
    elif not quiet:
        print_lines(*findings(found), f"-> {out}, {out.with_suffix('.json')}")
