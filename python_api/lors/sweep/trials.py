"""One setting and what became of it, and all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter

from ..errors import LorsError
from .home import load_lines
from .score import Objective

__all__ = ["Sweep", "Trial"]


@dataclass(frozen=True)
class Trial:
    """One setting and what became of it. `values`: one per objective of a complete one, else none."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    method: str
    number: int  # within its method
    settings: dict[str, bool | int | float | str]
    state: Literal["complete", "failed", "timeout", "nan"]
    values: tuple[float, ...] = ()
    error: str = ""
    merge_seconds: float = 0.0
    score_seconds: float = 0.0


@dataclass
class Sweep:
    """What `sweep` returns: all trials, in the order in which they finished."""

    directory: str
    objectives: tuple[Objective, ...]
    trials: list[Trial] = field(default_factory=list)

    @property
    def complete(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == "complete"]

    def best(self, objective: int = 0) -> Trial | None:
        """The complete trial with the best value; of equal ones the first."""
        sign = -1 if self.objectives[objective].maximize else 1
        return min(self.complete, key=lambda trial: sign * trial.values[objective], default=None)

    def front(self) -> list[Trial]:
        """Complete trials that no other beats in every objective."""

        def beats(a: Trial, b: Trial) -> bool:
            pairs = [
                (x - y) * (-1 if objective.maximize else 1)
                for x, y, objective in zip(a.values, b.values, self.objectives, strict=True)
            ]
            return all(p <= 0 for p in pairs) and any(p < 0 for p in pairs)

        return [trial for trial in self.complete if not any(beats(other, trial) for other in self.complete)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "objectives": [asdict(objective) for objective in self.objectives],
            "trials": [asdict(trial) for trial in self.trials],
            "front": [[trial.method, trial.number] for trial in self.front()],
        }


def load_trials(home: Path, goals: int | None = None) -> list[Trial]:
    """The trials of an earlier run; goals: how many values a score has."""
    trials = load_lines(home, TypeAdapter(Trial).validate_json)
    for trial in trials:
        if goals is not None and len(trial.values) != (goals if trial.state == "complete" else 0):
            raise LorsError(
                f"{home}/trials.jsonl: {trial.method} {trial.number}: expected {goals} values, got {len(trial.values)}"
            )
    return trials
