"""Merges and scores settings, here or on a worker of a cluster."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..errors import LorsError
from ..files.writing import writing
from ..methods import SPECS
from ..recipes.recipe import Recipe
from .home import Home, scratch
from .models import Models
from .score import Interrupted, Score, Scorer
from .trials import Trial


class Runner:
    """Merges and scores settings."""

    def __init__(self, models: Models, score: Callable[[Path], Score]) -> None:
        self.models = models
        self._score = partial(score, stop=models.stop) if isinstance(score, Scorer) else score

    def stop(self) -> None:
        """Ends the trials under way, by Interrupted."""
        self.models.stop.set()

    def trial(self, method: str, number: int, settings: dict[str, Any]) -> Trial:
        begun = time.perf_counter()
        with contextlib.ExitStack() as stack:
            try:
                model = stack.enter_context(self.models.model(method, number, settings))
            except LorsError as error:
                return Trial(method, number, settings, "failed", (), f"merge: {error}", time.perf_counter() - begun)
            merged = time.perf_counter()
            if self.models.stop.is_set():
                raise Interrupted
            score = self._score(model)
        seconds = merged - begun, time.perf_counter() - merged
        return Trial(method, number, settings, score.state, score.values, score.error, *seconds)


def remote_plan(
    home: Home, recipe: Recipe, score: object, models: Models, factors: Mapping[str, str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What `remote_trial` makes a runner from, on another node."""
    if not isinstance(score, Scorer):
        raise LorsError("--ray: expected a command or module:function as the scorer, got a function of this program")
    return {
        "home": str(home.path), "url": home.url, "recipe": recipe.to_yaml(resolved=True), "command": score.command,
        "objectives": score.objectives, "timeout": score.timeout, "factors": tuple(factors.items()), **options,
    }  # fmt: skip


@cache
def _adopted(
    home: str,
    url: str | None,
    recipe: str,
    scorer: Scorer,
    factors: tuple[tuple[str, str], ...],
    options: tuple[tuple[str, Any], ...],
) -> Runner:
    path = Path(home) if url is None else scratch(url, "work")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    models = Models(path, Recipe.from_yaml(recipe, SPECS), **dict(options))
    models.adopt(dict(factors))
    return Runner(models, scorer)


def remote_trial(plan: Mapping[str, Any], method: str, number: int, settings: dict[str, Any]) -> Trial:
    """One trial by a runner that every worker makes once."""
    options = dict(plan)
    scorer = Scorer(options.pop("command"), tuple(options.pop("objectives")), options.pop("timeout"))
    home, url, recipe, factors = (options.pop(key) for key in ("home", "url", "recipe", "factors"))
    return _adopted(home, url, recipe, scorer, factors, tuple(options.items())).trial(method, number, settings)


def remote_clear(url: str) -> None:
    """Removes what workers of one node kept for a sweep at a URL."""
    shutil.rmtree(scratch(url, "work"), ignore_errors=True)
