"""Sweeps: many settings of one merge, each merged and scored; decomposed once, resumed after a kill.

Work is shared between settings in two places. Every expert is decomposed once, at the largest rank of the sweep: a smaller
rank takes the first columns (agreeing with a decomposition at that rank to its contract, 1e-5 of L). And because

    W(lambda) = W0 + lambda * (W(1) - W0)

settings that differ only in lambda share one merge at lambda = 1, kept in float32; each of them then costs reading two
models and writing one. A trial may differ from `lors merge` of the same recipe in the last place of a weight.

What is in the directory: sweep.json (what is swept), trials.jsonl (a line per finished trial, on disk before the next
begins), optuna.log (the sampler's own storage), cache/, and at the end trials.csv, trials.json, best.yml and index.html.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import shutil
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import lors_kernels

from .checkpoint import open_checkpoint
from .errors import LorsError
from .expert_file import ExpertSource, is_expert_file
from .merging import merge_recipe
from .messages import nearest
from .methods import METHODS, SPECS
from .output import require_space, writing
from .recipe import Recipe
from .sweep_score import Objective, Score, Scorer
from .sweep_space import Space

__all__ = ["Sweep", "Trial", "sweep"]

SAMPLERS = ("grid", "random", "tpe")
SEPARABLE = ("lors", "svp", "magnitude_prune", "task_arithmetic")  # linear in lambda


@dataclass(frozen=True)
class Trial:
    """One setting and what became of it."""

    method: str
    number: int  # within its method
    settings: dict[str, Any]
    state: str
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
    progress: Callable[[Trial], None] = lambda trial: None,
) -> Sweep:
    """Merges and scores every setting; goes on where a sweep in the same directory was stopped.

    Args:
        options: parameter -> values, as `sweep_space.Axis` reads them.
        score: a command or module:function (`sweep_score.Scorer`), or a function from the merged directory to a Score.
        methods: methods to compare, each with the same number of trials; default: the recipe's.
        trials: per method; needed for "random" and "tpe", a bound for "grid".
        jobs: trials at a time; fewer when `memory` (bytes) is too little for so many.
        timeout: seconds a scorer may take.
        ray: "local" or the address of a cluster whose nodes all see the inputs and `out`: trials run there.

    A trial that fails, hangs or scores NaN is marked and the sweep goes on. LorsError: settings that are not valid, another
    sweep in the directory, or no trial that could be scored at all.
    """
    goals = tuple(map(Objective.parse, objectives))
    scorer = score if callable(score) else Scorer(score, goals, timeout)
    chosen = list(methods) or [recipe.merge_method]
    spaces = [_space(method, options) for method in chosen]
    _check_sampler(sampler, trials, jobs)
    home = Path(os.path.abspath(os.path.expanduser(out)))
    plan = {
        "recipe": yaml.safe_load(recipe.to_yaml(resolved=True)), "options": dict(options), "methods": chosen,
        "objectives": [asdict(goal) for goal in goals], "sampler": sampler, "seed": seed,
    }  # fmt: skip
    with _directory(home, plan):
        state = Sweep(str(home), goals, _load_trials(home))
        count = lors_kernels.thread_count(threads)
        with _Runner(home, recipe, scorer, backend, count, jobs, seed) as runner:
            runner.prepare(spaces)
            jobs = runner.fitting(jobs, memory)
            with _executor(runner, jobs, ray) as submit:
                for space in spaces:
                    draw = _source(space, sampler, trials, state, home, seed)
                    _run(draw, submit, state, space.method, jobs, progress)
        if not state.complete:
            last = state.trials[-1].error if state.trials else "there was no trial"
            raise LorsError(f"{home}: no trial could be scored; the last one: {last}")
        _conclude(home, recipe, state)
    return state


def _space(method: str, options: Mapping[str, str]) -> Space:
    if method not in SPECS:
        raise LorsError(f"--method: unknown method {method!r}{nearest(method, SPECS)}")
    known = {spec.name for spec in SPECS[method].parameters}
    everywhere = {spec.name for other in SPECS.values() for spec in other.parameters}
    for name in options:
        if name not in everywhere:
            raise LorsError(f"--{name}: no method has such a parameter{nearest(name, everywhere)}")
    if not known & options.keys():
        raise LorsError(f"--{next(iter(options), 'rank')}: method {method} has no such parameter{nearest('', known)}")
    return Space.of(SPECS[method], options)


def _check_sampler(sampler: str, trials: int | None, jobs: int) -> None:
    if sampler not in SAMPLERS:
        raise LorsError(f"--sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if sampler != "grid" and trials is None:
        raise LorsError(f"--trials: expected a number of trials for the sampler {sampler}")
    if trials is not None and trials < 1 or jobs < 1:
        raise LorsError(f"--trials, --jobs: expected at least 1, got {trials}, {jobs}")


# --- the directory


@contextlib.contextmanager
def _directory(home: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Makes or reopens a sweep's directory, for one process at a time."""
    with writing(home):
        home.mkdir(parents=True, exist_ok=True)
        lock = os.open(home / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LorsError(f"{home}: another sweep is running there") from None
        path = home / "sweep.json"
        if path.exists():
            _require_same(path, plan)
        elif others := sorted(p.name for p in home.iterdir() if p.name != ".lock"):
            raise LorsError(f"{home}: expected a new directory or that of a sweep, it has {others[0]!r}")
        else:
            _replace(path, json.dumps(plan, indent=2) + "\n")
        shutil.rmtree(home / "trials", ignore_errors=True)  # models of trials that were under way when it was killed
        yield
    finally:
        os.close(lock)


def _require_same(path: Path, plan: dict[str, Any]) -> None:
    try:
        before = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LorsError(f"{path}: cannot be read: {error}") from None
    now = json.loads(json.dumps(plan))
    if before != now:
        odd = next(key for key in now if not isinstance(before, dict) or before.get(key) != now[key])
        raise LorsError(f"{path.parent}: holds a sweep with another {odd}; use a new directory, or the same settings")


def _replace(path: Path, text: str) -> None:
    with writing(path):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def _load_trials(home: Path) -> list[Trial]:
    """The trials of an earlier run; a last line that a kill cut off is dropped."""
    path = home / "trials.jsonl"
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    try:
        found = [Trial(**json.loads(line)) for line in whole.splitlines()]
        return [Trial(**{**asdict(trial), "values": tuple(trial.values)}) for trial in found]
    except (ValueError, TypeError, RecursionError) as error:
        raise LorsError(f"{path}: cannot be read: {error}") from None


def _save_trial(home: Path, trial: Trial) -> None:
    path = home / "trials.jsonl"
    with writing(path), path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(trial)) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


# --- which settings


@dataclass(frozen=True)
class _Draw:
    """Settings one after the other, and where their scores go."""

    ask: Callable[[], tuple[int, dict[str, Any]] | None]
    tell: Callable[[Trial], None] = lambda trial: None


def _source(space: Space, sampler: str, trials: int | None, state: Sweep, home: Path, seed: int) -> _Draw:
    done = {trial.number: trial for trial in state.trials if trial.method == space.method}
    if sampler == "tpe":
        return _optuna(space, int(trials or 0), done, state.objectives, home, seed)
    settings = space.grid() if sampler == "grid" else space.random(seed)
    numbered = enumerate(settings)
    left = ((number, one) for number, one in numbered if number not in done)

    def ask() -> tuple[int, dict[str, Any]] | None:
        found = next(left, None) if trials is None or sampler == "grid" else next(left)
        return found if found is not None and (trials is None or found[0] < trials) else None

    return _Draw(ask)


def _optuna(
    space: Space, trials: int, done: Mapping[int, Trial], objectives: Sequence[Objective], home: Path, seed: int
) -> _Draw:
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise LorsError("--sampler tpe: needs Optuna: pip install 'lors-merging[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(home / "optuna.log"))),
        study_name=space.method,
        directions=["maximize" if objective.maximize else "minimize" for objective in objectives],
        sampler=optuna.samplers.TPESampler(seed=seed + len(done), multivariate=False),
        load_if_exists=True,
    )
    failed = optuna.trial.TrialState.FAIL
    for old in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        # Under way when the sweep was killed: scored already, or never to be.
        trial = done.get(old.number)
        values = trial.values if trial and trial.state == "complete" else None
        study.tell(old.number, list(values) if values else None, state=None if values else failed)
    open_trials: dict[int, Any] = {}
    left = trials - len(done)

    def ask() -> tuple[int, dict[str, Any]] | None:
        nonlocal left
        if left <= 0:
            return None
        left -= 1
        asked = study.ask()
        open_trials[asked.number] = asked
        settings: dict[str, Any] = {}
        for axis in space.axes:
            if axis.interval is not None:
                settings[axis.name] = asked.suggest_float(axis.name, *axis.interval)
            else:
                settings[axis.name] = asked.suggest_categorical(axis.name, axis.values)
        return asked.number, settings

    def tell(trial: Trial) -> None:
        complete = trial.state == "complete"
        study.tell(
            open_trials.pop(trial.number), list(trial.values) if complete else None, state=None if complete else failed
        )

    return _Draw(ask, tell)


Submit = Callable[..., "Future[Trial]"]  # (method, number, settings)


@contextlib.contextmanager
def _executor(runner: _Runner, jobs: int, ray: str | None) -> Iterator[Submit]:
    """Where trials run: threads of this process, which wait for scorers most of the time, or tasks of a Ray cluster."""
    if ray is not None:
        from .ray_cluster import connected, submit_trial

        plan = runner.plan()
        with connected(ray, max(runner.threads, jobs)) as cluster:
            yield lambda *trial: submit_trial(cluster, runner.threads, 2 * runner.model_bytes, plan, *trial)
        return
    with ThreadPoolExecutor(jobs, thread_name_prefix="lors-trial") as pool:
        try:
            yield lambda *trial: pool.submit(runner.trial, *trial)
        except BaseException:
            runner.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _run(draw: _Draw, submit: Submit, state: Sweep, method: str, jobs: int, progress: Callable[[Trial], None]) -> None:
    home = Path(state.directory)
    running: set[Future[Trial]] = set()
    while True:
        while len(running) < jobs and (asked := draw.ask()) is not None:
            running.add(submit(method, *asked))
        if not running:
            return
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        for trial in (future.result() for future in finished):
            _save_trial(home, trial)
            state.trials.append(trial)
            draw.tell(trial)
            progress(trial)


# --- merging one setting


class _Runner:
    """Merges settings into directories that live as long as they are scored."""

    def __init__(
        self,
        home: Path,
        recipe: Recipe,
        score: Callable[[Path], Score],
        backend: str | None,
        threads: int,
        jobs: int,
        seed: int,
    ) -> None:
        self._home, self._recipe, self._score, self._backend = home, recipe, score, backend
        self.threads, self._seed = max(1, threads // jobs), seed
        self._sources: dict[str, ExpertSource] = {}
        self._units: OrderedDict[str, _Unit] = OrderedDict()
        self._lock, self._kept = threading.Lock(), jobs + 1
        self._owner = True  # of the directory: a worker of a cluster clears nothing up
        self._stack = contextlib.ExitStack()
        self.stop = threading.Event()
        with open_checkpoint(str(recipe.base_source or recipe.sources[0])) as base:
            self.model_bytes = sum(info.nbytes for info in base.tensors.values())

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        if exception[0] is None:  # all trials are done: what they shared is not needed again
            shutil.rmtree(self._home / "cache", ignore_errors=True)
        shutil.rmtree(self._home / "trials", ignore_errors=True)

    def plan(self) -> dict[str, Any]:
        """What `remote_runner` makes this runner from again, on another node."""
        if not isinstance(self._score, Scorer):
            raise LorsError(
                "--ray: expected a command or module:function as the scorer, got a function of this program"
            )
        return {
            "home": str(self._home), "recipe": self._recipe.to_yaml(resolved=True), "command": self._score.command,
            "objectives": self._score.objectives, "timeout": self._score.timeout, "backend": self._backend,
            "threads": self.threads, "seed": self._seed,
        }  # fmt: skip

    def fitting(self, jobs: int, memory: int | None) -> int:
        """How many trials fit into the memory: each may have its whole model in the scorer's memory."""
        if memory is None:
            return jobs
        if memory < self.model_bytes:
            raise LorsError(f"--memory: expected at least {self.model_bytes} bytes, one model, got {memory}")
        return max(1, min(jobs, memory // self.model_bytes))

    def prepare(self, spaces: Sequence[Space]) -> None:
        """Decomposes every expert at the largest rank, once."""
        from .task_vector import decompose

        require_space(self._home, (self._kept + 1) * self.model_bytes)
        ranks = [space.largest("rank") for space in spaces]
        rank = max((rank for rank in ranks if rank), default=None)
        if rank is None or self._recipe.base_source is None:
            return
        cache = self._home / "cache"
        cache.mkdir(exist_ok=True)
        for index in self._recipe.experts:
            source, label = self._recipe.sources[index], self._recipe.labels[index]
            with open_checkpoint(source) as checkpoint:
                if is_expert_file(checkpoint):
                    continue
            path = cache / f"expert-{index}-rank-{rank:g}.lors.safetensors"
            if not path.exists():
                decompose(
                    self._recipe.base_source, source, path, rank=rank, density=0, remainder="none", name=label,
                    target=None if self._recipe.target is None else self._recipe.target.model_dump(mode="json"),
                    seed=self._seed, backend=self._backend, threads=self.threads,
                )  # fmt: skip
            self._sources[label] = ExpertSource(self._stack.enter_context(open_checkpoint(path)))

    def adopt(self) -> None:
        """Uses the decompositions that another process has prepared, and leaves the directory to it."""
        self._owner = False
        for index in self._recipe.experts:
            for path in (self._home / "cache").glob(f"expert-{index}-rank-*.lors.safetensors"):
                source = ExpertSource(self._stack.enter_context(open_checkpoint(path)))
                self._sources[self._recipe.labels[index]] = source

    def factors(self, expert: str, name: str, rank: int) -> tuple[Any, Any] | None:
        """(left, right) of one matrix at a rank, from the cache; None when it is not there."""
        source = self._sources.get(expert)
        if source is None or source.rank(name) < rank:
            return None
        left, right = source.stored_factors(name)
        return left[:, :rank].copy(), right[:, :rank].copy()

    def trial(self, method: str, number: int, settings: dict[str, Any]) -> Trial:
        """Merges, scores and removes one setting."""
        model = self._home / "trials" / f"{method}-{number}"
        begun = time.perf_counter()
        try:
            self._merge(method, settings, model)
        except LorsError as error:
            return Trial(method, number, settings, "failed", (), f"merge: {error}", time.perf_counter() - begun)
        merged = time.perf_counter()
        try:
            score = Score("failed", (), "interrupted") if self.stop.is_set() else self._score(model)
        finally:
            shutil.rmtree(model, ignore_errors=True)
        seconds = merged - begun, time.perf_counter() - merged
        return Trial(method, number, settings, score.state, score.values, score.error, *seconds)

    def _merge(self, method: str, settings: dict[str, Any], out: Path) -> None:
        out.parent.mkdir(exist_ok=True)
        options: dict[str, Any] = {"backend": self._backend, "threads": self.threads, "durable": False}
        if not (method in SEPARABLE and "lambda" in settings and self._recipe.rest != "average"):
            merge_recipe(setting_recipe(self._recipe, method, settings), out, factors=self.factors, **options)
            return
        shared = {name: value for name, value in settings.items() if name != "lambda"}
        with self._unit(method, shared) as unit:
            if not unit.exists():
                whole = setting_recipe(self._recipe, method, shared | {"lambda": 1.0}, out_dtype="float32")
                merge_recipe(whole, unit, factors=self.factors, **options)
            line = Recipe.from_arguments(
                self._recipe.base_source, {"unit": unit}, "task_arithmetic", methods=SPECS, lam=settings["lambda"],
                out_dtype=self._recipe.output_dtype,
            )  # fmt: skip
            merge_recipe(line, out, **options)

    @contextlib.contextmanager
    def _unit(self, method: str, shared: Mapping[str, Any]) -> Iterator[Path]:
        """The place of the merge at lambda = 1 that settings share; one trial at a time makes it or uses it."""
        key = json.dumps([method, sorted(shared.items())])
        with self._lock:
            unit = self._units.setdefault(key, _Unit(self._home / "cache" / f"unit-{zlib.crc32(key.encode()):08x}"))
            self._units.move_to_end(key)
            unit.users += 1
            unit.path.parent.mkdir(exist_ok=True)
        try:
            with _locked(unit.path.with_suffix(".lock")):
                yield unit.path
        finally:
            with self._lock:
                unit.users -= 1
                for old in (
                    []
                    if not self._owner
                    else [k for k, u in self._units.items() if u.users == 0][: max(0, len(self._units) - self._kept)]
                ):
                    shutil.rmtree(self._units.pop(old).path, ignore_errors=True)


@dataclass
class _Unit:
    path: Path
    users: int = 0


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One holder at a time, of threads and processes."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@cache
def _adopted(home: str, recipe: str, scorer: Scorer, backend: str | None, threads: int, seed: int) -> _Runner:
    bound = Recipe.from_yaml(recipe, SPECS)
    runner = _Runner(Path(home), bound, scorer, backend, threads, 1, seed)
    runner.adopt()
    return runner


def remote_runner(
    home: str,
    recipe: str,
    command: str,
    objectives: tuple[Objective, ...],
    timeout: float | None,
    backend: str | None,
    threads: int,
    seed: int,
) -> _Runner:
    """The runner of `_Runner.plan`, made once per worker."""
    return _adopted(home, recipe, Scorer(command, tuple(objectives), timeout), backend, threads, seed)


def setting_recipe(recipe: Recipe, method: str, settings: Mapping[str, Any], out_dtype: str | None = None) -> Recipe:
    """The recipe with another method and parameters; what the method has no use for is left out."""
    known = {spec.name for spec in SPECS[method].parameters}
    data = recipe.to_dict(resolved=True) | {"merge_method": method}
    if out_dtype is not None:
        data["out_dtype"] = out_dtype
    data["parameters"] = {k: v for k, v in {**data.get("parameters", {}), **settings}.items() if k in known}
    for entry in data["models"]:
        own = entry.pop("parameters", {})
        if own := {name: value for name, value in own.items() if name in known and name not in settings}:
            entry["parameters"] = own
    if METHODS[method].everywhere:
        data.pop("target", None)
    return Recipe.from_yaml(yaml.safe_dump(data, sort_keys=False), SPECS)


# --- results


def _conclude(home: Path, recipe: Recipe, state: Sweep) -> None:
    """CSV, JSON, the best recipes, the page."""
    from .sweep_page import render

    names = list(dict.fromkeys(name for trial in state.trials for name in trial.settings))
    goals = [objective.name for objective in state.objectives]
    with writing(home / "trials.csv"), (home / "trials.csv").open("w", newline="", encoding="utf-8") as stream:
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
    _replace(home / "trials.json", json.dumps(data, indent=1) + "\n")
    for index, objective in enumerate(state.objectives):
        best = state.best(index)
        assert best is not None
        text = setting_recipe(recipe, best.method, best.settings).to_yaml()
        _replace(home / ("best.yml" if index == 0 else f"best-{objective.name}.yml"), text)
    _replace(home / "index.html", render(state))
