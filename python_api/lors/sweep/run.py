"""Sweeps: many settings of one merge, each merged and scored; decomposed once, resumed after a kill.

`sweep_inputs` knows the inputs by digest, `sweep_models` merges a setting, `sweep_score` scores it, `sweep_home` keeps
what became of it. A trial may differ from `lors merge` of the same recipe in the last place of a weight, and from a
decomposition at its own rank by the contract of the decomposition, 1e-5 of L.

What is in the directory: sweep.json (what is swept, and of which inputs), trials.jsonl (a line per finished trial, on disk
before the next begins), cache/, and at the end trials.csv, trials.json, best.yml and index.html.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import queue
import random
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter

import lors_kernels

from ..errors import LorsError, nearest
from ..files.writing import writing
from ..methods import SPECS
from ..public import public_text
from ..recipes.recipe import Recipe
from .home import STATE, Home, load_lines, scratch
from .inputs import Inputs
from .models import Models, axes, setting_recipe
from .score import Interrupted, Objective, Score, Scorer
from .space import Space

__all__ = ["Sweep", "Trial", "sweep"]

SAMPLERS = ("grid", "random", "tpe")


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


def sweep(
    recipe: Recipe,
    options: Mapping[str, str],
    score: str | Callable[[Path], Score],
    out: str | os.PathLike[str],
    *,
    methods: Sequence[str] = (),
    objectives: Sequence[str] = ("score",),
    sampler: str = "grid",
    trials: int | None = None,
    jobs: int = 1,
    memory: int | None = None,
    timeout: float | None = None,
    seed: int = 0,
    backend: str | None = None,
    threads: int | None = None,
    ray: str | None = None,
    retry: bool = False,
    progress: Callable[[Trial], None] = lambda trial: None,
) -> Sweep:
    """Merges and scores every setting; goes on where a sweep in the same directory was stopped.

    Args:
        options: parameter -> values, as `sweep_space.Axis` reads them.
        score: a command or module:function (`sweep_score.Scorer`), or a function from the merged directory to a Score.
        methods: methods to compare, each with the same number of trials; default: the recipe's.
        trials: per method; needed for "random" and "tpe", a bound for "grid".
        jobs: trials at a time; fewer when `memory` (bytes) is too little for so many.
        out: a directory, or an fsspec URL.
        timeout: seconds a scorer may take.
        ray: "local" or the address of a cluster whose nodes all see the inputs and `out`: trials run there.
        retry: trials of an earlier run that failed are tried again.

    A trial that fails, hangs or scores NaN is marked and the sweep goes on. LorsError: settings that are not valid, another
    sweep in the directory, or no trial that could be scored at all.
    """
    goals = tuple(map(Objective.parse, objectives))
    scorer = score if callable(score) else Scorer(score, goals, timeout)
    chosen = list(methods) or [recipe.merge_method]
    spaces = [_space(method, options) for method in chosen]
    _check_sampler(sampler, trials, jobs)
    home = Home(out)
    plan = {
        "recipe": yaml.safe_load(recipe.published().to_yaml(resolved=True)), "options": dict(options), "methods": chosen,
        "objectives": [asdict(goal) for goal in goals], "sampler": sampler, "seed": seed,
        "score": public_text(score) if isinstance(score, str) else None,
    }  # fmt: skip
    each = max(1, lors_kernels.thread_count(threads) // jobs)
    settings: dict[str, Any] = {
        "backend": backend, "threads": each, "seed": seed, "units": jobs + 1, "run": secrets.token_hex(8),
    }  # fmt: skip
    with home.open() as before:
        state = Sweep(str(home), goals, _load_trials(home.path, len(goals)))
        if before is not None:
            _require_same(home, before, plan, state)
        inputs = Inputs.of(recipe, scorer.data() if isinstance(scorer, Scorer) else None, threads)
        if before is not None:
            inputs.require_recorded(home, before["inputs"])
        home.begin(plan | {"inputs": inputs.record})
        if retry and len(state.complete) < len(state.trials):
            state.trials = state.complete
            home.replace("trials.jsonl", "".join(f"{json.dumps(asdict(trial))}\n" for trial in state.trials))
            home.push(("trials.jsonl",))
        models = Models(home.path, recipe, **settings)
        with contextlib.closing(models), _cleared(home):
            jobs = _fitting(jobs, memory, models.model_bytes)
            factors = models.prepare(_largest_rank(spaces), inputs)
            models.adopt({label: str(path) for label, path in factors.items()})
            remote = _remote_plan(home, recipe, scorer, models, home.share(factors), settings) if ray else None
            outcomes = _Outcomes(home, state, inputs)
            with _executor(_Runner(models, scorer), jobs, ray, remote, outcomes) as submit:
                for space in spaces:
                    draw = _source(space, sampler, trials, state, seed)
                    _run(draw, submit, outcomes, home, space.method, jobs, progress)
        if not state.complete:
            last = state.trials[-1].error if state.trials else "there was no trial"
            raise LorsError(f"{home}: no trial could be scored; the last one: {last} (--retry tries again)")
        _conclude(home, recipe, state)
    home.forget()
    return state


def _require_same(home: Home, before: Mapping[str, Any], plan: Mapping[str, Any], state: Sweep) -> None:
    """LorsError when the directory's sweep is another one. The scorer may be put right as long as it has scored nothing."""
    if "inputs" not in before:
        raise LorsError(
            f"{home}: a sweep of an earlier version, which kept no digests of its inputs; use a new directory"
        )
    now = json.loads(json.dumps(plan))
    odd = [key for key in now if before.get(key) != now[key] and not (key == "score" and not state.complete)]
    if odd:
        raise LorsError(f"{home}: holds a sweep with another {odd[0]}; use a new directory, or the same settings")


@contextlib.contextmanager
def _cleared(home: Home) -> Iterator[None]:
    """What trials share is kept for the next run unless all are done."""
    finished = False
    try:
        yield
        finished = True
    finally:
        home.clear(finished)


def _largest_rank(spaces: Sequence[Space]) -> float | None:
    return max((rank for rank in (space.largest("rank") for space in spaces) if rank), default=None)


def _space(method: str, options: Mapping[str, str]) -> Space:
    if method not in SPECS:
        raise LorsError(f"--method: unknown method {method!r}{nearest(method, SPECS)}")
    known = axes(method)
    everywhere = {name for other in SPECS for name in axes(other)}
    for name in options:
        if name not in everywhere:
            raise LorsError(f"--{name}: no method has such a parameter{nearest(name, everywhere)}")
    if not known.keys() & options.keys():
        raise LorsError(f"--{next(iter(options), 'rank')}: method {method} has no such parameter{nearest('', known)}")
    return Space.of(method, known, options)


def _check_sampler(sampler: str, trials: int | None, jobs: int) -> None:
    if sampler not in SAMPLERS:
        raise LorsError(f"--sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if sampler != "grid" and trials is None:
        raise LorsError(f"--trials: expected a number of trials for the sampler {sampler}")
    if trials is not None and trials < 1 or jobs < 1:
        raise LorsError(f"--trials, --jobs: expected at least 1, got {trials}, {jobs}")


def _load_trials(home: Path, goals: int | None = None) -> list[Trial]:
    """The trials of an earlier run; goals: how many values a score has."""
    trials = load_lines(home, TypeAdapter(Trial).validate_json)
    for trial in trials:
        if goals is not None and len(trial.values) != (goals if trial.state == "complete" else 0):
            raise LorsError(
                f"{home}/trials.jsonl: {trial.method} {trial.number}: expected {goals} values, got {len(trial.values)}"
            )
    return trials


# --- which settings


@dataclass(frozen=True)
class _Draw:
    """Settings one after the other, and where their scores go."""

    ask: Callable[[], tuple[int, dict[str, Any]] | None]
    tell: Callable[[Trial], None] = lambda trial: None


def _source(space: Space, sampler: str, trials: int | None, state: Sweep, seed: int) -> _Draw:
    done = [trial for trial in state.trials if trial.method == space.method]
    numbers = {trial.number for trial in done}
    if sampler == "tpe":
        return _optuna(space, int(trials or 0) - len(done), done, state, seed)
    settings = space.grid() if sampler == "grid" else space.random(seed)
    left = ((number, one) for number, one in enumerate(settings) if number not in numbers)

    def ask() -> tuple[int, dict[str, Any]] | None:
        found = next(left, None) if trials is None or sampler == "grid" else next(left)
        return found if found is not None and (trials is None or found[0] < trials) else None

    return _Draw(ask)


def _optuna(space: Space, left: int, done: Sequence[Trial], state: Sweep, seed: int) -> _Draw:
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

    return _Draw(ask, tell)


Submit = Callable[..., object]  # (method, number, settings); what comes of it goes to `_Outcomes`


class _Outcomes:
    """Finished trials: taken down in the thread that finished them, then handed to the main thread.

    A signal interrupts the main thread only, and nowhere where it holds a lock that others wait for: it waits for a queue, not
    for futures.
    """

    def __init__(self, home: Home, state: Sweep, inputs: Inputs) -> None:
        self._home, self._state, self._inputs, self._lock = home, state, inputs, threading.Lock()
        self._queue: queue.SimpleQueue[Trial | BaseException] = queue.SimpleQueue()

    def of(self, run: Callable[[], Trial]) -> None:
        """Runs a trial, or waits for it, and keeps what came of it."""
        try:
            trial = run()
            with self._lock:
                self._inputs.require_unchanged()
                self._home.append(json.dumps(asdict(trial)))
                self._state.trials.append(trial)
        except BaseException as error:
            self._queue.put(error)
        else:
            self._queue.put(trial)

    def next(self) -> Trial:
        """The next that is finished; raises what the trial raised."""
        outcome = self._queue.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


@contextlib.contextmanager
def _executor(
    runner: _Runner, jobs: int, ray: str | None, plan: Mapping[str, Any] | None, outcomes: _Outcomes
) -> Iterator[Submit]:
    """Where trials run: threads of this process, which wait for scorers most of the time, or tasks of a Ray cluster."""
    if ray is not None and plan is not None:
        from ..cluster import connected, on_every_node, submit_trial

        with connected(ray, max(runner.models.threads, jobs)) as cluster:
            memory = 2 * runner.models.model_bytes
            try:
                yield lambda *trial: submit_trial(cluster, runner.models.threads, memory, plan, outcomes.of, *trial)
            finally:
                if plan["url"] is not None:
                    on_every_node(cluster, remote_clear, plan["url"])
        return
    with ThreadPoolExecutor(jobs, thread_name_prefix="lors-trial") as pool:
        try:
            yield lambda *trial: pool.submit(outcomes.of, partial(runner.trial, *trial))
        except BaseException:
            runner.stop()  # merges and scorers; what is finished is still taken down
            raise


def _run(
    draw: _Draw,
    submit: Submit,
    outcomes: _Outcomes,
    home: Home,
    method: str,
    jobs: int,
    progress: Callable[[Trial], None],
) -> None:
    running = 0
    while True:
        while running < jobs and (asked := draw.ask()) is not None:
            submit(method, *asked)
            running += 1
        if not running:
            return
        trial = outcomes.next()
        running -= 1
        home.push(STATE)
        draw.tell(trial)
        progress(trial)


# --- one setting


class _Runner:
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


def _fitting(jobs: int, memory: int | None, model_bytes: int) -> int:
    """How many trials fit into the memory: each may have its whole model in the scorer's memory."""
    if memory is None:
        return jobs
    if memory < model_bytes:
        raise LorsError(f"--memory: expected at least {model_bytes} bytes, one model, got {memory}")
    return max(1, min(jobs, memory // model_bytes))


# --- on other machines


def _remote_plan(
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
) -> _Runner:
    path = Path(home) if url is None else scratch(url, "work")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    models = Models(path, Recipe.from_yaml(recipe, SPECS), **dict(options))
    models.adopt(dict(factors))
    return _Runner(models, scorer)


def remote_trial(plan: Mapping[str, Any], method: str, number: int, settings: dict[str, Any]) -> Trial:
    """One trial by a runner that every worker makes once."""
    options = dict(plan)
    scorer = Scorer(options.pop("command"), tuple(options.pop("objectives")), options.pop("timeout"))
    home, url, recipe, factors = (options.pop(key) for key in ("home", "url", "recipe", "factors"))
    return _adopted(home, url, recipe, scorer, factors, tuple(options.items())).trial(method, number, settings)


def remote_clear(url: str) -> None:
    """Removes what workers of one node kept for a sweep at a URL."""
    shutil.rmtree(scratch(url, "work"), ignore_errors=True)


# --- results


def _conclude(home: Home, recipe: Recipe, state: Sweep) -> None:
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
    data = {
        "objectives": [asdict(objective) for objective in state.objectives],
        "trials": [asdict(trial) for trial in state.trials],
        "front": [[trial.method, trial.number] for trial in state.front()],
    }
    home.replace("trials.json", json.dumps(data, indent=1) + "\n")
    for index, objective in enumerate(state.objectives):
        best = state.best(index)
        assert best is not None
        text = setting_recipe(recipe, best.method, best.settings).published().to_yaml()
        home.replace(("best.yml" if index == 0 else f"best-{objective.name}.yml"), text)
    home.replace("index.html", render(state))
    home.push()
