"""The page of a sweep: trade-offs, every trial, the best of each method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import webpage

if TYPE_CHECKING:
    from .trials import Sweep, Trial


def render(state: Sweep) -> str:
    """HTML of a finished sweep."""
    failed = len(state.trials) - len(state.complete)
    best = state.best()
    assert best is not None
    goal = state.objectives[0]
    lead = (
        f"{len(state.trials)} trials, {failed} without a score. Best {goal.name} ({'highest' if goal.maximize else 'lowest'}): "
        f"{best.values[0]:.4g} with {best.method}, {_setting(best)}."
    )
    sections = [
        webpage.section("tradeoffs", "Trade-offs", '<div class="charts">', *_charts(state), "</div>"),
        webpage.section("best", "Best of each method", _best(state)),
        webpage.section("trials", "All trials", _trials(state)),
    ]
    links = {"tradeoffs": "Trade-offs", "best": "Best of each method", "trials": "All trials"}
    return webpage.page("Sweep", lead, sections, links)


def _setting(trial: Trial) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in trial.settings.items())


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _charts(state: Sweep) -> list[str]:
    """Each objective over each parameter that changes, a colour per method; two objectives against each other."""
    methods = list(dict.fromkeys(trial.method for trial in state.complete))
    names = list(dict.fromkeys(name for trial in state.complete for name in trial.settings))
    drawn = []
    for index, objective in enumerate(state.objectives):
        for name in names:
            found = {
                method: [
                    (float(trial.settings[name]), trial.values[index])
                    for trial in state.complete
                    if trial.method == method and isinstance(trial.settings.get(name), (int, float))
                ]
                for method in methods
            }
            if len({x for points in found.values() for x, _ in points}) > 1:
                drawn.append(webpage.scatter(f"{objective.name} over {name}", found, name, objective.name))
    if len(state.objectives) > 1:
        first, second = state.objectives[:2]
        pairs = {
            method: [(t.values[0], t.values[1]) for t in state.complete if t.method == method] for method in methods
        }
        pairs["best trade-offs"] = [(t.values[0], t.values[1]) for t in state.front()]
        drawn.append(webpage.scatter(f"{second.name} over {first.name}", pairs, first.name, second.name))
    return drawn


def _best(state: Sweep) -> str:
    rows = []
    for method in dict.fromkeys(trial.method for trial in state.trials):
        mine = type(state)(state.directory, state.objectives, [t for t in state.trials if t.method == method])
        for index, objective in enumerate(state.objectives):
            found = mine.best(index)
            tried = f"{len(mine.complete)} of {len(mine.trials)}"
            if found is None:
                rows.append((method, objective.name, "none", "", tried))
            else:
                rows.append((method, objective.name, f"{found.values[index]:.4g}", _setting(found), tried))
    return webpage.table("Best trials", ("method", "objective", "value", "setting", "scored"), rows)


def _trials(state: Sweep) -> str:
    goals = [objective.name for objective in state.objectives]
    rows = [
        (
            f"{trial.method} {trial.number}",
            _setting(trial),
            *(f"{value:.4g}" for value in trial.values or [float("nan")] * len(goals)),
            f"{trial.merge_seconds:.1f}",
            f"{trial.score_seconds:.1f}",
            trial.state if not trial.error else f"{trial.state}: {trial.error[:80]}",
        )
        for trial in state.trials
    ]
    return webpage.table("Trials as they finished", ("trial", "setting", *goals, "merge s", "score s", "state"), rows)
