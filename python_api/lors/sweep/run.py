"""Sweeps: many settings of one merge, each merged and scored; decomposed once, resumed after a kill.

`inputs` knows the inputs by digest, `models` merges a setting, `score` scores it, `home` keeps what became of it. A trial
may differ from `lors merge` of the same recipe in the last place of a weight, and from a decomposition at its own rank by
the contract of the decomposition, 1e-5 of L.

What is in the directory: sweep.json (what is swept, and of which inputs), trials.jsonl (a line per finished trial, on disk
before the next begins), cache/, and at the end trials.csv, trials.json, best.yml and index.html.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import lors_kernels

from ..errors import LorsError, SettingError, nearest
from ..methods import SPECS
from ..public import public_text
from ..recipes.recipe import Recipe
from .home import STATE, Home
from .inputs import Inputs
from .models import Models, axes
from .results import conclude
from .runner import Runner, remote_clear, remote_plan, remote_trial
from .sampling import Draw, check_sampler, draws
from .score import Objective, Score, Scorer
from .space import Space
from .trials import Sweep, Trial, load_trials

__all__ = ["sweep"]


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
        options: parameter -> values, as `space.Axis` reads them.
        score: a command or module:function (`score.Scorer`), or a function from the merged directory to a Score.
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
    check_sampler(sampler, trials, jobs)
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
        state = Sweep(str(home), goals, load_trials(home.path, len(goals)))
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
            remote = remote_plan(home, recipe, scorer, models, home.share(factors), settings) if ray else None
            outcomes = _Outcomes(home, state, inputs)
            with _executor(Runner(models, scorer), jobs, ray, remote, outcomes) as submit:
                for space in spaces:
                    draw = draws(space, sampler, trials, state, seed)
                    _run(draw, submit, outcomes, home, space.method, jobs, progress)
        if not state.complete:
            last = state.trials[-1].error if state.trials else "there was no trial"
            raise LorsError(f"{home}: no trial could be scored; the last one: {last} (--retry tries again)")
        conclude(home, recipe, state)
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
        what = f"with another {odd[0].removesuffix('s')}"
        if odd[0] == "options":
            there, here = before.get("options"), now["options"]
            there = there if isinstance(there, dict) else {}
            what = f"of other values of {next(n for n in {**there, **here} if there.get(n) != here.get(n))}"
        raise LorsError(f"{home}: holds a sweep {what}; use a new directory, or the same settings")


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
            raise SettingError(name, f"no method has such a parameter{nearest(name, everywhere)}")
    if not known.keys() & options.keys():
        raise SettingError(next(iter(options), "rank"), f"method {method} has no such parameter{nearest('', known)}")
    return Space.of(method, known, options)


# --- which settings


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
    runner: Runner, jobs: int, ray: str | None, plan: Mapping[str, Any] | None, outcomes: _Outcomes
) -> Iterator[Submit]:
    """Where trials run: threads of this process, which wait for scorers most of the time, or tasks of a Ray cluster."""
    if ray is not None and plan is not None:
        from ..cluster import connected, on_every_node, submit

        with connected(ray, max(runner.models.threads, jobs)) as cluster:
            memory = 2 * runner.models.model_bytes
            try:
                yield lambda *trial: submit(
                    cluster, runner.models.threads, memory, outcomes.of, remote_trial, dict(plan), *trial
                )
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
    draw: Draw,
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


def _fitting(jobs: int, memory: int | None, model_bytes: int) -> int:
    """How many trials fit into the memory: each may have its whole model in the scorer's memory."""
    if memory is None:
        return jobs
    if memory < model_bytes:
        raise LorsError(f"--memory: expected at least {model_bytes} bytes, one model, got {memory}")
    return max(1, min(jobs, memory // model_bytes))
