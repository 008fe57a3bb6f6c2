"""`lors sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..command import Inputs, Json, Machine, Output, Quiet, Settings, as_options
from ..errors import LorsError, print_lines
from ..public import public
from .options import Backend, method_names, pairs_of


def sweep(
    recipe: Annotated[Path, typer.Argument(help="Recipe whose settings are varied.")],
    *,
    score: Annotated[
        str, Inputs(metavar="CMD|MODULE:FUNCTION", help="Scores a merged directory; its last line is the score.")
    ],
    rank: Annotated[str | None, Settings(metavar="VALUES", help="1,2,4 or FROM:TO:STEP or FROM:TO.")] = None,
    density: Annotated[str | None, Settings(metavar="VALUES", help="As --rank.")] = None,
    lam: Annotated[str | None, Settings("--lambda", metavar="VALUES", help="As --rank.")] = None,
    param: Annotated[list[str] | None, Settings(metavar="NAME=VALUES", help="Any other parameter; repeat.")] = None,
    method: Annotated[
        list[str] | None,
        Settings(autocompletion=method_names, help="Compare methods with as many trials each; repeat."),
    ] = None,
    objective: Annotated[
        list[str] | None,
        Settings(metavar="NAME[:min|max]", help="What the scorer reports, and which is better (default: min); repeat."),
    ] = None,
    sampler: Annotated[str, Settings(help="grid, random or tpe (Optuna).")] = "grid",
    trials: Annotated[
        int | None, Settings(metavar="N", min=1, help="Trials per method (default: the whole grid).")
    ] = None,
    jobs: Annotated[int, Machine("--jobs", "-j", metavar="N", min=1, help="Trials at a time.")] = 1,
    memory: Annotated[str | None, Machine(metavar="SIZE", help="Memory for the models of trials, such as 8GB.")] = None,
    timeout: Annotated[float | None, Settings(metavar="SECONDS", min=0, help="Seconds a scorer may take.")] = None,
    seed: Annotated[int, Settings(metavar="N", min=0, help="Of the samplers and decompositions.")] = 0,
    backend: Backend = None,
    threads: Annotated[
        int | None, Machine(metavar="N", min=1, help="CPU threads of all trials (default: all cores).")
    ] = None,
    ray: Annotated[str | None, Machine(metavar="local|ADDRESS", help="Run trials on a Ray cluster.")] = None,
    retry: Annotated[bool, Settings("--retry", help="Try trials again that failed in an earlier run.")] = False,
    out: Annotated[
        str, Output("--out", "-o", metavar="DIR", help="Directory or URL of the sweep; the same again goes on.")
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge and score many settings; the experts are decomposed once, a killed sweep goes on where it was."""
    from ..methods import SPECS
    from ..recipes.entries import parse_size
    from ..recipes.recipe import Recipe
    from ..sweep.run import sweep as run
    from ..sweep.trials import Trial

    more = pairs_of(param, "--param", str)
    given = {"rank": rank, "density": density, "lambda": lam, **more}
    options = {name: text for name, text in given.items() if text is not None}
    if not options:
        raise LorsError("sweep: expected something to vary: --rank, --density, --lambda or --param")
    try:
        budget = None if memory is None else parse_size(memory)
    except ValueError as error:
        raise LorsError(f"--memory: {error}") from None

    def show(trial: Trial) -> None:
        if not (quiet or as_json):
            setting = ", ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.settings.items()
            )
            result = ", ".join(f"{value:.5g}" for value in trial.values) or f"{trial.state}: {trial.error}"
            print_lines(f"{trial.method} {trial.number}: {setting}: {result}")

    with as_options(lambda: {name: f"--param {name}" for name in more}):
        done = run(
            Recipe.load(recipe, SPECS), options, score, out, methods=method or (), objectives=objective or ("score",),
            sampler=sampler, trials=trials, jobs=jobs, memory=budget, timeout=timeout, seed=seed, backend=backend,
            threads=threads, ray=ray, retry=retry, progress=show,
        )  # fmt: skip
    best = done.best()
    if as_json:
        print(json.dumps(done.to_dict(), indent=1))
    elif best is not None and not quiet:
        goal = done.objectives[0]
        print_lines(
            f"best: {best.method} {best.number}, {goal.name} {best.values[0]:.5g} ({goal.wanted}) "
            f"-> {public(out)}/best.yml, {public(out)}/index.html"
        )
