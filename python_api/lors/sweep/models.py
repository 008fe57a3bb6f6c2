"""The merged models of a sweep's settings: as much as can be is done once for many of them.

Every expert is decomposed once, at the largest rank of the sweep. Settings that differ only in lambda share one merge at
lambda = 1, the unit, kept in float32:

    W(lambda) = W0 + lambda * (W(1) - W0)         (tensors that `rest: average` has averaged stay as they are)

The same of rest_lambda and the tensors that the method does not treat.

Such a setting costs reading two models and writing one, over the file of the setting before it: pages that are in memory
already are written over three times as fast as new ones are made.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import yaml

from ..checkpoints.reader import open_checkpoint
from ..engine.work import Work
from ..errors import LorsError
from ..experts.expert_source import ExpertSource
from ..experts.opening import kind_of, source_of
from ..files.directory import RECIPE_FILE
from ..files.lock import flock
from ..files.writing import require_space, writing
from ..merging.job import new_report, planned
from ..merging.on_disk import merge_recipe
from ..merging.publish import weight_writer
from ..methods import METHODS, SPECS, Reduction
from ..recipes.parameters import REST_LAMBDA, ParameterSpec, Rest
from ..recipes.recipe import Recipe
from .inputs import BASE, Inputs
from .score import Interrupted

__all__ = ["Models", "setting_recipe"]

LINEAR = ("lambda", REST_LAMBDA)  # a merge at 1 gives those at other values
REST = ParameterSpec("rest", "str", choices=get_args(Rest), help="what becomes of the tensors that are not decomposed")


class Models:
    """Merges settings of `recipe` in the directory `home`; used by several threads, and by processes at once.

    units: merges at lambda = 1 that are kept at a time. run: names the run of the sweep, for which alone they are kept. `stop`
    ends merges that are under way, by Interrupted.
    """

    def __init__(
        self, home: Path, recipe: Recipe, *, backend: str | None, threads: int, seed: int, units: int, run: str
    ) -> None:
        self._home, self._recipe, self._backend, self.threads, self._seed = home, recipe, backend, threads, seed
        self._units, self._factors, self._free, self._run = units, dict[str, ExpertSource](), list[Path](), run
        self.stop = threading.Event()
        self._lock, self._stack = threading.Lock(), contextlib.ExitStack()
        with open_checkpoint(str(recipe.base_source or recipe.sources[0])) as base:
            self.model_bytes = sum(info.nbytes for info in base.tensors.values())

    def close(self) -> None:
        self._stack.close()

    # --- decompositions

    def prepare(self, rank: float | None, inputs: Inputs) -> dict[str, Path]:
        """Decomposes every expert that is a checkpoint at a rank, unless that is done: label -> file of its factors."""
        from ..experts.decompose import decompose

        require_space(self._home, (2 * self._units + 1) * self.model_bytes)
        found: dict[str, Path] = {}
        if rank is None or self._recipe.base_source is None or self._recipe.vocabulary == "union":
            return found  # an expert file has no tokens: every setting is merged from the checkpoints
        target = None if self._recipe.target is None else self._recipe.target.model_dump(mode="json")
        for index in self._recipe.experts:
            source, label = self._recipe.sources[index], self._recipe.labels[index]
            with open_checkpoint(source) as checkpoint:
                if kind_of(checkpoint) != "checkpoint":
                    continue  # has its factors already
            path = self._home / "cache" / f"expert-{index}-rank-{rank:g}.lors.safetensors"
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                decompose(
                    self._recipe.base_source, source, path, rank=rank, density=0, remainder="none", name=label,
                    target=target, seed=self._seed, backend=self._backend, threads=self.threads,
                )  # fmt: skip
            _require_made_from(path, inputs, label)
            found[label] = path
        return found

    def adopt(self, factors: Mapping[str, str]) -> None:
        """Uses decompositions that `prepare` made: label -> path or URL."""
        for label, location in factors.items():
            self._factors[label] = ExpertSource(self._stack.enter_context(open_checkpoint(location)))

    def factors(self, expert: str, name: str, rank: int) -> tuple[Any, Any] | None:
        """(left, right) of one matrix at a rank; None when they are not known."""
        source = self._factors.get(expert)
        if source is None or source.rank(name) < rank:
            return None
        left, right = source.stored_factors(name)
        return left[:, :rank].copy(), right[:, :rank].copy()

    # --- models

    @contextlib.contextmanager
    def model(self, method: str, number: int, settings: Mapping[str, Any]) -> Iterator[Path]:
        """The directory of one setting's merged model, for the time of the block. LorsError when it cannot be merged."""
        out = self._home / "trials" / f"{method}-{number}"
        shared = METHODS[method].separable and "lambda" in settings and self._recipe.vocabulary == "base"
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        try:
            if shared:
                self._take_free(out)
                self._along_line(method, settings, out)
            else:
                shutil.rmtree(out, ignore_errors=True)  # a worker that was lost may have written it
                self._merge(setting_recipe(self._recipe, method, settings), out)
            yield out
        finally:
            if shared:
                self._give_free(out)
            else:
                shutil.rmtree(out, ignore_errors=True)

    def _merge(self, recipe: Recipe, out: Path) -> None:
        merge_recipe(
            recipe, out, factors=self.factors, backend=self._backend, threads=self.threads, durable=False,
            progress=lambda *_: self._go_on(),
        )  # fmt: skip

    def _go_on(self) -> None:
        if self.stop.is_set():
            raise Interrupted

    def _take_free(self, out: Path) -> None:
        """Puts the directory of an earlier setting at `out`, to be written over; what the scorer put there goes."""
        with self._lock:
            free = self._free.pop() if self._free else None
        if free is not None and not out.exists() and free.is_dir():
            free.rename(out)
        out.mkdir(exist_ok=True)
        for path in out.iterdir():
            status = path.lstat()
            if path.suffix == ".safetensors" and path.is_file() and not path.is_symlink() and status.st_nlink == 1:
                continue
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _give_free(self, out: Path) -> None:
        idle = out.with_name(f".idle-{secrets.token_hex(8)}")
        with contextlib.suppress(FileNotFoundError):  # the scorer may have taken it away
            out.rename(idle)
            with self._lock:
                self._free.append(idle)

    def _along_line(self, method: str, settings: Mapping[str, Any], out: Path) -> None:
        """W0 + lambda * (W(1) - W0)"""
        recipe = setting_recipe(self._recipe, method, settings)
        shared = {name: value for name, value in settings.items() if name not in LINEAR}
        ones = {name: 1.0 for name in LINEAR if name in settings}
        with contextlib.ExitStack() as stack:
            unit = stack.enter_context(self._unit(method, shared, ones))
            base = stack.enter_context(open_checkpoint(str(recipe.base_source), name="base"))
            whole = stack.enter_context(open_checkpoint(unit))
            sources = [source_of(checkpoint, base) for checkpoint in (base, whole)]
            report = new_report(recipe, None, self._backend, self.threads)
            change = partial(_along, recipe, settings)
            job = planned(recipe, sources, base.naming, base.config, report, change)
            for path in whole.sidecars():
                with writing(out):
                    shutil.copyfile(path, out / path.name)
            with weight_writer(recipe, whole, out, job.works, over=True) as writer:
                job.engine(writer.write, lambda *_: self._go_on()).run(job.works)
                base.require_unchanged()
                writer.finish()
        with writing(out):
            (out / RECIPE_FILE).write_text(recipe.published().to_yaml(resolved=True), encoding="utf-8")

    # --- merges at lambda = 1

    @contextlib.contextmanager
    def _unit(self, method: str, shared: Mapping[str, Any], ones: Mapping[str, Any]) -> Iterator[Path]:
        """The merge at lambda = 1: made by whoever comes first, there for the time of the block."""
        settings = {**shared, **ones}
        key = hashlib.sha256(json.dumps([self._run, method, sorted(settings.items())]).encode()).hexdigest()[:16]
        path = self._home / "cache" / f"unit-{key}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            flock(lock, fcntl.LOCK_SH, path)
            while not path.exists():
                flock(lock, fcntl.LOCK_EX, path)
                if not path.exists():
                    self._merge(setting_recipe(self._recipe, method, settings, out_dtype="float32"), path)
                flock(lock, fcntl.LOCK_SH, path)  # not one step: another may forget it in between, then once more
            os.utime(path)
            self._forget(path)
            yield path

    def _forget(self, used: Path) -> None:
        """Removes the units that were not used for longest and are not in use, but for the last few."""
        others = []
        for path in used.parent.glob("unit-*"):
            with contextlib.suppress(FileNotFoundError):  # another process forgets too
                if path.is_dir() and path != used:
                    others.append((path.stat().st_mtime_ns, path))
        for _, path in sorted(others, reverse=True)[self._units - 1 :]:
            with path.with_suffix(".lock").open("w") as lock, contextlib.suppress(BlockingIOError):
                flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
                shutil.rmtree(path, ignore_errors=True)


def _require_made_from(path: Path, inputs: Inputs, label: str) -> None:
    """LorsError unless a decomposition is that of the inputs: it may lie there since an earlier run."""
    with open_checkpoint(path) as checkpoint:
        layout = ExpertSource(checkpoint).layout
    for whose, made_from in ((BASE, layout.base), (f"expert {label!r}", layout.expert)):
        if made_from != inputs.weights[whose]:
            raise LorsError(f"{path}: decomposed from something else: {whose} has other digests; remove the file")


def _along(recipe: Recipe, settings: Mapping[str, Any], work: Work) -> Work:
    """The work of a merge as a way along the line from the base to the merge at lambda = 1 and rest_lambda = 1."""
    method = METHODS[recipe.merge_method]
    factor = settings["lambda"]
    if not work.matrix and (recipe.confined or not method.everywhere):
        apart = REST_LAMBDA in recipe.parameters or (recipe.rest or method.spec.rest) == "average"
        factor = settings.get(REST_LAMBDA, 1.0 if apart else factor)
    return replace(work, reductions=work.reductions and (Reduction(factor),), matrix=False)


def axes(method: str) -> dict[str, ParameterSpec]:
    """What can be varied: the method's parameters, and `rest` where a recipe may say what becomes of other tensors."""
    parameters = {spec.name: spec for spec in SPECS[method].parameters}
    return {**parameters, REST.name: REST} if METHODS[method].targets else parameters


def setting_recipe(recipe: Recipe, method: str, settings: Mapping[str, Any], out_dtype: str | None = None) -> Recipe:
    """The recipe with another method and parameters; what the method has no use for is left out."""
    known = {spec.name for spec in SPECS[method].parameters}
    data = recipe.to_dict(resolved=True) | {"merge_method": method}
    if "rest" in settings:
        data["rest"] = settings["rest"]
    if out_dtype is not None:
        data["out_dtype"] = out_dtype
    data["parameters"] = {k: v for k, v in {**data.get("parameters", {}), **settings}.items() if k in known}
    for entry in data["models"]:
        own = entry.pop("parameters", {})
        if own := {name: value for name, value in own.items() if name in known and name not in settings}:
            entry["parameters"] = own
    if data.get("rest", SPECS[method].rest) == "base" or not METHODS[method].targets:
        data["parameters"].pop(REST_LAMBDA, None)
    if not METHODS[method].targets:
        data.pop("rest", None)
    if METHODS[method].everywhere and not ("rest" in data or REST_LAMBDA in data["parameters"]):
        data.pop("target", None)
    return Recipe.from_yaml(yaml.safe_dump(data, sort_keys=False), SPECS)
