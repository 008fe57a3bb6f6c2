"""The page of a sweep: the best setting and what speaks for it, trade-offs, every trial."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..pages import charts, colours, html

if TYPE_CHECKING:
    from .trials import Sweep, Trial

_SHARED = "best trade-offs"
_DECADE = 10  # values that span more than so much lie on a logarithmic axis


def render(state: Sweep) -> str:
    """HTML of a finished sweep."""
    methods = list(dict.fromkeys(trial.method for trial in state.trials))
    goals = " and ".join(f"{goal.name} ({goal.wanted})" for goal in state.objectives)
    lead = f"{len(state.trials)} trials of {', '.join(methods)}; wanted: {goals}."
    sections = [
        html.findings(findings(state)),
        html.section("tradeoffs", "Trade-offs", html.charts(_charts(state))),
        html.section("best", "Best of each method", _best(state)),
        html.section("trials", "All trials", _trials(state)),
    ]
    return html.page("Sweep", lead, sections)


def findings(state: Sweep) -> list[str]:
    """What stands out, in sentences, the conclusion first."""
    best, goal = state.best(), state.objectives[0]
    assert best is not None
    found = [f"Best {goal.name}: {best.values[0]:.4g}, by {best.method} with {_setting(best) or 'nothing to set'}."]
    others = [
        (each, by)
        for method, each in _by_method(state).items()
        if method != best.method and (by := each.best()) is not None
    ]
    if others:
        ranked = sorted(others, key=lambda pair: pair[1].values[0], reverse=goal.maximize)
        found.append(
            f"Other methods at their best: {', '.join(f'{by.method} {by.values[0]:.4g}' for _, by in ranked)}."
        )
    edges = _edges(state, best)
    if edges:
        found.append(
            f"The best lies at the edge of what was tried, and a better one may lie beyond: {', '.join(edges)}."
        )
    if len(state.objectives) > 1:
        found.append(
            f"{len(state.front())} of {len(state.complete)} settings are trade-offs that no other beats in every objective."
        )
    failed = [trial for trial in state.trials if trial.state != "complete"]
    if failed:
        found.append(
            f"{len(failed)} of {len(state.trials)} trials have no score; the last: {failed[-1].method} {failed[-1].number}, "
            f"{failed[-1].state}{': ' if failed[-1].error else ''}{failed[-1].error[:120]}."
        )
    return found


def _by_method(state: Sweep) -> dict[str, Sweep]:
    return {
        method: type(state)(state.directory, state.objectives, [t for t in state.trials if t.method == method])
        for method in dict.fromkeys(trial.method for trial in state.trials)
    }


def _edges(state: Sweep, best: Trial) -> list[str]:
    """Parameters of which the best has the least or the greatest of at least three values of its method."""
    found = []
    for name, value in best.settings.items():
        tried = {
            trial.settings[name] for trial in state.trials if trial.method == best.method and name in trial.settings
        }
        if len(tried) > 2 and _is_number(value) and all(map(_is_number, tried)) and value in (min(tried), max(tried)):
            found.append(f"{name} {_text(value)}")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _setting(trial: Trial) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in trial.settings.items())


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _charts(state: Sweep) -> Iterator[str]:
    """Each objective over each parameter that changes, a colour per method; two objectives against each other."""
    split = {method: each.complete for method, each in _by_method(state).items()}
    styles = colours.of_methods({method: method for method in split})
    names = list(dict.fromkeys(name for trial in state.complete for name in trial.settings))
    for index, objective in enumerate(state.objectives):
        for name in names:
            found = {
                method: [(float(t.settings[name]), t.values[index]) for t in trials if _is_number(t.settings.get(name))]
                for method, trials in split.items()
            }
            values = {x for points in found.values() for x, _ in points}
            if len(values) > 1:
                log = min(values) > 0 and max(values) > _DECADE * min(values)
                drawn = charts.scatter(found, styles, name, objective.name, log=log)
                yield html.figure(f"{objective.name} over {name}", drawn, "#trials")
    if len(state.objectives) > 1:
        first, second = state.objectives[:2]
        pairs = {method: [(t.values[0], t.values[1]) for t in trials] for method, trials in split.items()}
        pairs[_SHARED] = [(t.values[0], t.values[1]) for t in state.front()]
        drawn = charts.scatter(pairs, styles, first.name, second.name, ringed=_SHARED)
        yield html.figure(f"{second.name} over {first.name}", drawn, "#trials")


def _best(state: Sweep) -> str:
    rows = []
    for method, mine in _by_method(state).items():
        for index, objective in enumerate(state.objectives):
            found = mine.best(index)
            tried = f"{len(mine.complete)} of {len(mine.trials)}"
            if found is None:
                rows.append((method, objective.name, "none", "", tried))
            else:
                rows.append((method, objective.name, f"{found.values[index]:.4g}", _setting(found), tried))
    return html.table("Best trials", ("method", "objective", "value", "setting", "scored"), rows)


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
    return html.table("Trials as they finished", ("trial", "setting", *goals, "merge s", "score s", "state"), rows)
