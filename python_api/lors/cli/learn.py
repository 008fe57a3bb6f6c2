"""`lors learn`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from ..command import Inputs, Json, Output, Quiet, Settings
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


def learn(
    base: BaseModel,
    experts: Experts,
    *,
    data: Recordings,
    language: LanguageOf = None,
    task: Annotated[str, Inputs(help="What experts answer: transcribe, translate or both.")] = "transcribe",
    split: Split = "train",
    limit: Limit = 100,
    sample_seed: SampleSeed = 0,
    parts: Annotated[
        str, Settings(help="What has a weight: delta; apart (L and S); orthogonal (L made orthogonal, and S).")
    ] = "delta",
    steps: Annotated[int, Settings(min=1, help="Steps of training.")] = 120,
    batch_size: Annotated[int, Settings(min=1, help="Recordings per step, of all experts together.")] = 16,
    learning_rate: Annotated[float, Settings(help="Of Adam.")] = 0.02,
    seed: Annotated[int, Settings(min=0, help="Of the order of the recordings.")] = 0,
    device: SpeechDevice = None,
    cache: FeatureCache = None,
    out: Annotated[Path, Output("--out", "-o", help="Recipe to write, for `lors merge`.")],
    force: Annotated[bool, Output("--force", help="Replace a recipe that was learned.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A weight per matrix and expert, learned from recordings without texts: a recipe that merges without them.

    lors learn BASE ca=./whisper-ca de=./whisper-de --data corpus/ -o recipe.yml
    """
    from ..speech.commands import device_of, require_extra
    from ..speech.data.utterance import parse_tasks
    from ..speech.learning import Learning
    from ..speech.learning import learn as run

    require_extra()
    named = experts_of(experts, "learn")
    codes = languages_of(language, list(named))
    run(
        base, named, out, data=data, languages=codes, tasks=parse_tasks(task), split=split, limit=limit,
        how=Learning(parts, steps, batch_size, learning_rate, seed), device=device_of(device), cache=cache,
        sample_seed=sample_seed, force=force, progress=not quiet,
    )  # fmt: skip
    if as_json:
        print(json.dumps({"recipe": str(out)}))
    elif not quiet:
        print_lines(f"{len(named)} experts -> {out}: lors merge {out} OUT")
