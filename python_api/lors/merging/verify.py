"""Reload a merged checkpoint and compare it with the definition of its method (`definitions`)."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..checkpoints import layers
from ..checkpoints.layers import kind
from ..checkpoints.reader import Checkpoint, open_checkpoint, require_unchanged
from ..checkpoints.tensor_info import FLOATS
from ..engine.cpu import OVERFLOWS
from ..engine.report import KindRow, MergeReport
from ..errors import LorsError
from ..experts.opening import kind_of
from ..experts.source import Slot, Source
from ..methods import METHODS
from ..recipes.parameters import BOOST, BOOST_MERGED
from ..recipes.recipe import Recipe
from . import definitions
from .definitions import Expert, Merged
from .job import open_models

# Two decompositions agree to about 1e-6 of the largest entry of the update, and then an entry or two at the selection's
# threshold fall on the other side of it. So nearly all entries must agree closely, and a few may not.
ENTRY_ERROR = 2e-5  # of the update's largest entry
ENTRY_ERRORS = {"wudi": 2e-3}  # float32 sums over the ridge: docs/methods.md
FLIPS = 1e-4  # share of the entries, besides two per expert
SUM_ERROR = 8 * 2.0**-24  # of an entry: a few roundings in float32 before the one to the written type


def disagreements(got: np.ndarray, want: np.ndarray, base: np.ndarray, entry_error: float = ENTRY_ERROR) -> int:
    """How many entries of a merged tensor, in the type that was written, differ by more than rounding; others in float64."""
    error = entry_error * np.abs(want - base).max(initial=0.0) + SUM_ERROR * np.abs(want)
    with np.errstate(over="ignore"):
        # rounding keeps the order: what lies between two numbers lies between them when they are rounded
        least, most = ((want + side).astype(np.float32).astype(got.dtype) for side in (-error, error))
    return int(np.count_nonzero(~((least <= got) & (got <= most))))


def allowed_disagreements(entries: int, experts: int) -> int:
    """How many may."""
    return 2 * experts + int(FLIPS * entries * experts)


ENERGY_ERROR = 1e-4  # of delta's energy: what the kernels promise of their sums, and of L
SAMPLE = 1 << 22  # entries of base and experts that are compared besides one tensor of each kind


def verify(recipe: Recipe, out: str | os.PathLike[str], report: MergeReport | None = None) -> str:
    """Checks every tensor's name, shape, type and finiteness, and the values of a sample against `definitions`.

    The sample is one tensor of each kind, and all others of a small model. Which tensors a method treats (`layers`), the
    values of parameters (`Recipe`) and reading are the merge's own. report: what the merge said; its energies are checked for
    the kinds of which all tensors are in the sample. Returns a line that says what was checked; LorsError if more entries
    differ than can lie at the selection's threshold. Memory: one tensor of all experts, in float64 and more than once.
    """
    with contextlib.ExitStack() as stack:
        inputs = _Inputs(recipe, stack)
        merged = stack.enter_context(open_checkpoint(os.fspath(out), name=os.fspath(out)))
        kinds = defaultdict(list)
        for name in inputs.base.tensors:
            _require_written(merged, name, *inputs.expected_type(name))
            kinds[kind(name)].append(name)
        sample = _sample([*kinds.values()], inputs)
        flips, energies = 0, {}
        for name in sample:
            want = inputs.merged(name)
            energies[name] = want.energies
            flips += _compare(name, merged, want.values, inputs)
        require_unchanged((*inputs.checkpoints, merged))  # or else the difference is theirs
    for row in report.kinds if report is not None and inputs.plain else []:
        found = [sums for name in kinds[row.kind] if (sums := energies.get(name)) is not None]
        if len(found) == len(kinds[row.kind]):
            _compare_energies(row, np.sum(found, axis=0))
    entries = sum(inputs.base.tensors[name].numel for name in sample)
    return (
        f"checked: {len(inputs.base.tensors)} tensors reloaded, {len(sample)} of them compared with the method's definition, "
        f"{flips} of {entries:,} entries at the selection's threshold differ"
    )


class _Inputs:
    """Base and experts of a recipe, a whole tensor of them at a time."""

    def __init__(self, recipe: Recipe, stack: contextlib.ExitStack) -> None:
        self.recipe, self.method = recipe, METHODS[recipe.merge_method]
        models = open_models(recipe, stack)
        base, self.checkpoints = models.base, models.checkpoints
        self.base, *self.experts = models.sources
        everywhere = self.method.everywhere and not recipe.confined
        self.treated = set(self.base.tensors)
        self.boosted = set[str]()
        if not everywhere or recipe.boosted:
            self.boosted = set(layers.select(self.base.tensors, base.naming, base.config, recipe.target).names)
        if not everywhere:
            self.treated = self.boosted
        self.depth = layers.positions(self.base.tensors)
        # of expert files and adapters the report counts what they store
        stored = any(kind_of(expert) != "checkpoint" for expert in models.experts)
        self.plain = self.method.relative and not stored

    def expected_type(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        spec, dtype = self.base.tensors[name], self.recipe.output_dtype
        return (FLOATS[dtype] if dtype is not None and spec.floating else np.dtype(spec.dtype)), spec.shape

    def read(self, source: Source, name: str) -> np.ndarray:
        spec = self.base.tensors[name]
        return source.fetch(name, 0, spec.numel, Slot()).reshape(spec.shape)

    def merged(self, name: str) -> Merged:
        """A tensor by definition."""
        base = self.read(self.base, name)
        if not self.base.tensors[name].floating or not base.size:
            return Merged(base, np.zeros(3))
        recipe, indices = self.recipe, self.recipe.experts if self.method.relative else self.recipe.inputs
        at: dict[str, Any] = {"tensor": name, "position": self.depth[name]}
        models = [recipe.params_for(model=index, **at) for index in indices]
        shared = recipe.params_for(**at)
        shares = [model.get(BOOST) if name in self.boosted else None for model in models]
        experts = [self._expert(source, name, base, share) for source, share in zip(self.experts, shares, strict=True)]
        if name not in self.treated:
            rule = recipe.rest or self.method.spec.rest
            return definitions.rest(rule, base.astype(np.float64), experts, models, shared)
        method = recipe.merge_method
        merged = definitions.merged(method, base.astype(np.float64), experts, models, shared, name, recipe.seed)
        if name not in self.boosted or (share := shared.get(BOOST_MERGED)) is None:
            return merged
        u, sigma, v = definitions.boosted(merged.values - base, share, 2.0**-20)
        return merged._replace(values=base + (u * sigma) @ v)

    def _expert(self, source: Source, name: str, base: np.ndarray, share: float | None) -> Expert:
        values = self.read(source, name)
        delta = (values.astype(np.float32) - base.astype(np.float32)).astype(np.float64)
        factors = source.factors(name)
        exact = delta if factors is None else factors.exact().reshape(delta.shape)
        if share is not None:
            svd = definitions.boosted(exact, share, max(exact.shape) * 2.0**-53)
            exact = (svd[0] * svd[1]) @ svd[2]
            return Expert(source.name, base + exact, exact.astype(np.float32).astype(np.float64), exact, svd=svd)
        stored = None if source.parts is None else source.parts.stored(name)
        return Expert(source.name, values.astype(np.float64), delta, exact, stored)


def _sample(kinds: Sequence[Sequence[str]], inputs: _Inputs) -> list[str]:
    """One tensor of each kind, and of the others as many as are soon compared."""
    sample = [names[len(names) // 2] for names in kinds]
    left = SAMPLE
    for name in (name for names in kinds for name in names if name not in set(sample)):
        left -= inputs.base.tensors[name].numel * len(inputs.checkpoints)
        if left >= 0:
            sample.append(name)
    return sample


def _require_written(merged: Checkpoint, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    info = merged.info(name)
    if (info.dtype, info.shape) != (dtype, shape):
        raise LorsError(f"check: tensor {name!r}: expected {dtype} {shape}, got {info.dtype} {info.shape}")
    if str(dtype) in OVERFLOWS and not np.isfinite(merged.read(name).astype(np.float32)).all():
        raise LorsError(f"check: tensor {name!r}: expected finite values, got NaN or infinity")


def _compare(name: str, merged: Checkpoint, want: np.ndarray, inputs: _Inputs) -> int:
    """How many entries differ; LorsError if they are too many."""
    got, base, dtype = merged.read(name), inputs.read(inputs.base, name), inputs.expected_type(name)[0]
    if np.array_equal(want, base):  # carried over
        wrong, allowed = int(np.count_nonzero(got != base.astype(dtype))), 0
    else:
        accuracy = ENTRY_ERRORS.get(inputs.recipe.merge_method, ENTRY_ERROR)
        wrong = disagreements(got, want, base.astype(np.float64), accuracy)
        allowed = allowed_disagreements(want.size, len(inputs.experts))
    if wrong > allowed:
        method = inputs.recipe.merge_method
        raise LorsError(
            f"check: tensor {name!r}: {wrong} of {want.size} entries differ from the definition of {method}, "
            f"expected at most {allowed}"
        )
    return wrong


def _compare_energies(row: KindRow, want: np.ndarray) -> None:
    """LorsError unless the report's energies are those of the definition."""
    for what, got, wanted in zip(
        ("delta", "L", "S"), (row.delta_energy, row.low_energy, row.sparse_energy), want, strict=True
    ):
        if not abs(got - wanted) <= ENERGY_ERROR * want[0]:
            raise LorsError(
                f"check: {row.kind}: expected an energy of {what} of {wanted:.6g}, got {got:.6g} in the report"
            )
