"""`lors calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..command import Inputs, Json, Machine, Output, Quiet, Settings
from ..errors import print_lines
from .options import experts_of, languages_of


def calibrate(
    base: Annotated[str, typer.Argument(help="Base checkpoint: directory or hub id.")],
    experts: Annotated[list[str], typer.Argument(metavar="[NAME=]EXPERT...", help="Checkpoints trained from it.")],
    *,
    data: Annotated[str, Inputs(help="Manifest, covost2:DIR, common_voice:DIR or fleurs:[DIR]; texts are not read.")],
    language: Annotated[
        list[str] | None, Inputs(metavar="NAME=CODE", help="Of one expert (default: its name); repeat.")
    ] = None,
    split: Annotated[str, Inputs(help="train, dev or test.")] = "train",
    limit: Annotated[int, Inputs(metavar="N", min=1, help="Utterances per expert.")] = 100,
    plus: Annotated[
        bool, Settings("--plus", help="RegMean++: through merged layers, layer by layer; as many times the work.")
    ] = False,
    device: Annotated[str | None, Machine(help="cpu or cuda (default: cuda where there is one).")] = None,
    cache: Annotated[Path | None, Machine(help="Keep features in this directory.")] = None,
    sample_seed: Annotated[int, Inputs(help="Which utterances --limit takes.")] = 0,
    out: Annotated[Path, Output("--out", "-o", help="Directory for a file per expert.")],
    force: Annotated[bool, Output("--force", help="Replace files of statistics in OUT.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
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
        cache=cache, sample_seed=sample_seed, force=force, progress=not quiet,
    )  # fmt: skip
    if as_json:
        print(json.dumps({name: str(path) for name, path in paths.items()}))
    elif not quiet:
        for name, path in paths.items():
            print_lines(f"{name}: {path.stat().st_size / 1e6:.1f} MB -> {path}")
