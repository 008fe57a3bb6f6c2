"""What a finished sweep leaves: CSV, JSON, the best recipes, the page."""

from __future__ import annotations

import csv
import json

from ..files.writing import writing
from ..recipes.recipe import Recipe
from .home import Home
from .models import setting_recipe
from .trials import Sweep


def conclude(home: Home, recipe: Recipe, state: Sweep) -> None:
    """CSV, JSON, the best recipes, the page."""
    from .page import render

    names = list(dict.fromkeys(name for trial in state.trials for name in trial.settings))
    goals = [objective.name for objective in state.objectives]
    path = home.path / "trials.csv"
    with writing(path), path.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["method", "number", *names, "state", *goals, "merge_seconds", "score_seconds", "error"])
        for t in state.trials:
            values = t.values or ("",) * len(goals)
            cells = [t.settings.get(name, "") for name in names]
            table.writerow(
                [
                    t.method,
                    t.number,
                    *cells,
                    t.state,
                    *values,
                    round(t.merge_seconds, 3),
                    round(t.score_seconds, 3),
                    t.error,
                ]
            )
    home.replace("trials.json", json.dumps(state.to_dict(), indent=1) + "\n")
    for index, objective in enumerate(state.objectives):
        best = state.best(index)
        assert best is not None
        text = setting_recipe(recipe, best.method, best.settings).published().to_yaml()
        home.replace(("best.yml" if index == 0 else f"best-{objective.name}.yml"), text)
    home.replace("index.html", render(state))
    home.push()
