"""`lors calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import print_lines
from .options import experts_of, languages_of


def calibrate(
    base: Annotated[str, typer.Argument(help="Base checkpoint: directory or hub id.")],
    experts: Annotated[list[str], typer.Argument(metavar="[NAME=]EXPERT...", help="Checkpoints trained from it.")],
    data: Annotated[
        str, typer.Option(help="Manifest, covost2:DIR, common_voice:DIR or fleurs:[DIR]; texts are not read.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory for a file per expert.")],
    language: Annotated[
        list[str] | None, typer.Option(metavar="NAME=CODE", help="Of one expert (default: its name); repeat.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "train",
    limit: Annotated[int, typer.Option(min=1, help="Utterances per expert.")] = 100,
    plus: Annotated[
        bool, typer.Option("--plus", help="RegMean++: through merged layers, layer by layer; as many times the work.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep features in this directory.")] = None,
    sample_seed: Annotated[int, typer.Option(help="Which utterances --limit takes.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace files of statistics in OUT.")] = False,
) -> None:
    """What the experts' layers read on recordings without texts: statistics for the method regmean.

    lors calibrate BASE ca=./whisper-ca de=./whisper-de --data corpus/ -o stats
    """
    from ..speech.calibration import calibrate as run
    from ..speech.commands import device_of, require_extra

    require_extra()
    named = experts_of(experts, "calibrate")
    codes = languages_of(language, list(named))
    paths = run(
        base, named, out, data=data, languages=codes, split=split, limit=limit, plus=plus, device=device_of(device),
        cache=cache, sample_seed=sample_seed, force=force, progress=True,
    )  # fmt: skip
    for name, path in paths.items():
        print_lines(f"{name}: {path.stat().st_size / 1e6:.1f} MB -> {path}")
