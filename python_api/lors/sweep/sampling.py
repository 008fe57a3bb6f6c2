"""Which settings are tried: a grid, random ones, or Optuna's."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import LorsError
from .space import Space
from .trials import Sweep, Trial

SAMPLERS = ("grid", "random", "tpe")


def check_sampler(sampler: str, trials: int | None, jobs: int) -> None:
    if sampler not in SAMPLERS:
        raise LorsError(f"--sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if sampler != "grid" and trials is None:
        raise LorsError(f"--trials: expected a number of trials for the sampler {sampler}")
    if trials is not None and trials < 1 or jobs < 1:
        raise LorsError(f"--trials, --jobs: expected at least 1, got {trials}, {jobs}")


@dataclass(frozen=True)
class Draw:
    """Settings one after the other, and where their scores go."""

    ask: Callable[[], tuple[int, dict[str, Any]] | None]
    tell: Callable[[Trial], None] = lambda trial: None


def draws(space: Space, sampler: str, trials: int | None, state: Sweep, seed: int) -> Draw:
    done = [trial for trial in state.trials if trial.method == space.method]
    numbers = {trial.number for trial in done}
    if sampler == "tpe":
        return _optuna(space, int(trials or 0) - len(done), done, state, seed)
    settings = space.grid() if sampler == "grid" else space.random(seed)
    left = ((number, one) for number, one in enumerate(settings) if number not in numbers)

    def ask() -> tuple[int, dict[str, Any]] | None:
        found = next(left, None) if trials is None or sampler == "grid" else next(left)
        return found if found is not None and (trials is None or found[0] < trials) else None

    return Draw(ask)


def _optuna(space: Space, left: int, done: Sequence[Trial], state: Sweep, seed: int) -> Draw:
    """Optuna's proposals: the same for the same seed, finished trials and number of the trial, one trial at a time."""
    try:
        import optuna
        from optuna.distributions import CategoricalDistribution, FloatDistribution
    except ImportError:
        raise LorsError("--sampler tpe: needs Optuna: pip install 'lors-merging[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["maximize" if goal.maximize else "minimize" for goal in state.objectives])
    distributions = {
        axis.name: FloatDistribution(*axis.interval) if axis.interval else CategoricalDistribution(axis.values)
        for axis in space.axes
    }

    def tell(trial: Trial) -> None:
        if trial.state == "complete":  # of others there is nothing to learn
            values = list(trial.values)
            study.add_trial(
                optuna.trial.create_trial(params=trial.settings, distributions=distributions, values=values)
            )

    try:
        for trial in done:
            tell(trial)
    except (ValueError, TypeError) as error:
        raise LorsError(f"{state.directory}: trials.jsonl: not a trial of this sweep: {error}") from None
    taken = {trial.number for trial in done}
    numbers = itertools.islice((number for number in itertools.count() if number not in taken), max(0, left))

    def ask() -> tuple[int, dict[str, Any]] | None:
        if (number := next(numbers, None)) is None:
            return None
        # A sampler for every trial: what it draws does not depend on how often the sweep was interrupted.
        own = random.Random(f"{seed}-{space.method}-{number}").getrandbits(32)
        study.sampler = optuna.samplers.TPESampler(seed=own)
        asked = study.ask(distributions)
        study.tell(asked, state=optuna.trial.TrialState.FAIL)  # it comes back as a finished one, if at all
        return number, dict(asked.params)

    return Draw(ask, tell)
