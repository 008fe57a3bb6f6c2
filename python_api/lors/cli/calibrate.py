"""`lors calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from ..command import Json, Output, Quiet, Settings
from ..errors import print_lines
from .options import (
    BaseModel,
    Experts,
    FeatureCache,
    LanguageOf,
    Limit,
    Recordings,
    SampleSeed,
    SpeechDevice,
    Split,
    experts_of,
    languages_of,
)  # fmt: skip


def calibrate(
    base: BaseModel,
    experts: Experts,
    *,
    data: Recordings,
    language: LanguageOf = None,
    split: Split = "train",
    limit: Limit = 100,
    plus: Annotated[
        bool, Settings("--plus", help="RegMean++: through merged layers, layer by layer; as many times the work.")
    ] = False,
    device: SpeechDevice = None,
    cache: FeatureCache = None,
    sample_seed: SampleSeed = 0,
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
