"""`lors learn`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import print_lines
from .options import experts_of, languages_of


def learn(
    base: Annotated[str, typer.Argument(help="Base checkpoint: directory or hub id.")],
    experts: Annotated[list[str], typer.Argument(metavar="[NAME=]EXPERT...", help="Checkpoints trained from it.")],
    data: Annotated[
        str, typer.Option(help="Manifest, covost2:DIR, common_voice:DIR or fleurs:[DIR]; texts are not read.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Recipe to write, for `lors merge`.")],
    language: Annotated[
        list[str] | None, typer.Option(metavar="NAME=CODE", help="Of one expert (default: its name); repeat.")
    ] = None,
    task: Annotated[str, typer.Option(help="What experts answer: transcribe, translate or both.")] = "transcribe",
    parts: Annotated[
        str, typer.Option(help="What has a weight: delta; apart (L and S); orthogonal (L made orthogonal, and S).")
    ] = "delta",
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 120,
    batch_size: Annotated[int, typer.Option(min=1, help="Recordings per step, of all experts together.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 0.02,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the recordings.")] = 0,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "train",
    limit: Annotated[int, typer.Option(min=1, help="Utterances per expert.")] = 100,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep features in this directory.")] = None,
    sample_seed: Annotated[int, typer.Option(help="Which utterances --limit takes.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that was learned.")] = False,
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
        sample_seed=sample_seed, force=force, progress=True,
    )  # fmt: skip
    print_lines(f"{len(named)} experts -> {out}: lors merge {out} OUT")
