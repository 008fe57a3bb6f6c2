"""Every method against mergekit itself on the same tensors, or against its formula; seeding, chunks, bad parameters."""

from __future__ import annotations

import atexit
import functools
import re
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import lors
import tiny
from calibrated import mean_square, statistics
from helpers import module
from lors import LorsError
from lors.experts.statistics import write_statistics
from lors.merging.definitions import Expert, merged
from lors.methods import METHODS, SPECS, operands
from lors.methods.della_linear import ROWS
from lors.methods.model_stock import interpolation
from lors_kernels import random_key
from lors_kernels.counter_random import random_bits

State = dict[str, np.ndarray]
SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (64, 48),
    "model.layers.0.mlp.up_proj.weight": (40, 64),
    "conv.weight": (8, 6, 3),
    "norm.weight": (77,),
}
NAMES = ("x", "y", "z")
WEIGHTS = {"x": 1.0, "y": 0.5, "z": -0.7}


def states(scale: float = 0.1, names: tuple[str, ...] = NAMES) -> tuple[State, dict[str, State]]:
    rng = np.random.default_rng(5)
    base = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}
    return base, {
        name: {key: x + np.float32(scale) * rng.standard_normal(x.shape).astype(np.float32) for key, x in base.items()}
        for name in names
    }


def ours(base: State, experts: Mapping[str, State], method: str, **parameters: Any) -> State:
    return lors.merge_state_dicts(base, experts, method, **parameters)


def mergekit(base: State | None, experts: Mapping[str, State], method: str, parameters: dict[str, Any]) -> State:
    import torch

    merge_state_dicts = module("mergekit.merge_methods", "peers").merge_state_dicts
    models = {name: {k: torch.from_numpy(v) for k, v in state.items()} for name, state in experts.items()}
    if base is not None:
        models = {"base": {k: torch.from_numpy(v) for k, v in base.items()}} | models
    with mock.patch("torch.bernoulli", draws(experts)):
        merged = merge_state_dicts(models, method, base="base" if base is not None else None, parameters=parameters)
    return {key: value.numpy() for key, value in merged.items()}


def draws(experts: Mapping[str, State], seed: int = 0) -> Callable[[Any], Any]:
    """Instead of torch.bernoulli: the numbers we draw, in mergekit's order of tensors and experts."""
    import torch

    calls = iter([(name, tensor) for tensor in SHAPES for name in experts])

    def bernoulli(probability: Any) -> Any:
        name, tensor = next(calls)
        limit = (probability.double().numpy().ravel() * 2.0**32).astype(np.uint64)
        bits = random_bits(random_key(seed, name, tensor), 0, probability.numel())
        return torch.from_numpy(bits < limit).view(probability.shape).to(probability.dtype)

    return bernoulli


def assert_same(got: State, want: State, base: State) -> None:
    """Within 1e-6 of the weights, and within 1e-5 of the update where that is the larger part of it."""
    assert got.keys() == want.keys()
    for key, value in want.items():
        apart = np.linalg.norm(got[key].astype(np.float64) - value)
        assert apart <= 1e-6 * np.linalg.norm(value), key
        assert apart <= 1e-5 * np.linalg.norm(value - base[key]) + 2e-7 * np.linalg.norm(value), key


@pytest.mark.parametrize(
    "method,parameters",
    [
        ("task_arithmetic", {"lambda": 0.3}),
        ("task_arithmetic", {"normalize": True, "int8_mask": True}),
        ("ties", {}),
        ("ties", {"density": 0.3, "lambda": 0.7}),
        ("ties", {"density": 0.3, "rescale": True, "normalize": False, "int8_mask": True}),
        ("ties", {"density": 0.0001}),  # at least one entry
        ("ties", {"density": 0.0}),
        ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
        ("breadcrumbs", {"density": 0.95, "gamma": 0.1, "rescale": True}),  # fewer outliers, so that enough remain
        ("breadcrumbs_ties", {"density": 0.6}),
        ("dare_linear", {"density": 0.4}),
        ("dare_linear", {"density": 1.0}),
        ("dare_ties", {"density": 0.4, "rescale": False, "normalize": True}),
        ("della", {"density": 0.5}),
        ("della_linear", {"density": 0.4, "epsilon": 0.2, "lambda": 1.5}),
    ],
)
def test_same_as_mergekit(method: str, parameters: dict[str, Any]) -> None:
    """The random ones with our numbers under mergekit's arithmetic: seeding is the one difference, and on purpose."""
    base, experts = states()
    want = mergekit(base, experts, method, parameters | {"weight": WEIGHTS})
    lam = {"lam" if key == "lambda" else key: value for key, value in parameters.items()}
    got = ours(base, experts, method, weight=WEIGHTS, **lam)
    assert_same(got, want, base)
    assert any((got[key] != base[key]).any() for key in base) or parameters.get("density") == 0


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_is_mergekits(filter_wise: bool) -> None:
    base, experts = states()
    for state in experts.values():  # a common direction, so that the angles are not those of noise
        for key in state:
            state[key] += np.float32(0.3)
    want = mergekit(base, experts, "model_stock", {"filter_wise": filter_wise})
    assert_same(ours(base, experts, "model_stock", filter_wise=filter_wise), want, base)


def test_model_stock_keeps_the_base_where_its_formula_has_no_value() -> None:
    opposite = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert interpolation(opposite) == 0 and interpolation(np.ones((2, 2))) == 1


@pytest.mark.parametrize("scale", [0.01, 3.0])  # almost parallel: linear; far apart: on the sphere
def test_slerp_is_mergekits(scale: float) -> None:
    base, experts = states(scale, ("x",))
    assert_same(ours(base, experts, "slerp", t=0.3), mergekit(base, experts, "slerp", {"t": 0.3}), base)


@pytest.mark.parametrize("normalize", [False, True])
def test_linear_is_mergekits(normalize: bool) -> None:
    base, experts = states()
    want = mergekit(None, experts, "linear", {"weight": WEIGHTS, "normalize": normalize})
    assert_same(ours(base, experts, "linear", weight=WEIGHTS, normalize=normalize), want, base)


def test_ties_keeps_exactly_k_and_the_first_of_equals() -> None:
    """On purpose unlike mergekit, whose unstable sort may keep any of the equal entries."""
    base = {"w": np.zeros((4, 5), np.float32)}
    merged = ours(base, {"x": {"w": np.ones((4, 5), np.float32)}}, "ties", density=0.25)["w"]
    assert (merged.ravel() == [1] * 5 + [0] * 15).all()


# --- methods that mergekit has not got: their formulas ----------------------------------------------------------------


def nonzero(sigma: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """As the methods' pages say: singular value 0 is what float64 cannot tell from it."""
    return sigma > sigma[0] * max(shape) * 2.0**-53


def polar_by_svd(x: np.ndarray) -> np.ndarray:
    u, sigma, vh = np.linalg.svd(x, full_matrices=False)
    there = nonzero(sigma, x.shape)
    return u[:, there] @ vh[there]


def by_formula(method: str, base: np.ndarray, experts: list[np.ndarray], lam: float = 1.0) -> np.ndarray:
    """The update of `tsv` or `iso_c` in float64, every SVD a full one."""
    deltas = [(x - base).astype(np.float64) for x in experts]
    if method == "iso_c":
        total = np.sum(deltas, axis=0)
        return lam * np.linalg.svd(total, compute_uv=False).mean() * polar_by_svd(total)
    left, right, sigma = [], [], []
    for delta in deltas:
        u, s, vh = np.linalg.svd(delta, full_matrices=False)
        there = nonzero(s, delta.shape)[: min(base.shape) // len(deltas)].nonzero()[0]
        left, right, sigma = [*left, u[:, there]], [*right, vh[there].T], [*sigma, s[there]]
    u, v = (polar_by_svd(np.concatenate(parts, axis=1)) for parts in (left, right))
    return lam * (u * np.concatenate(sigma)) @ v.T


def merged_update(method: str, base: np.ndarray, experts: list[np.ndarray], **settings: Any) -> np.ndarray:
    named = {f"t{t}": {"q_proj.weight": x} for t, x in enumerate(experts)}
    merged = ours({"q_proj.weight": base}, named, method, target={"include": ["q_proj"]}, **settings)
    return merged["q_proj.weight"].astype(np.float64) - base


def with_spectrum(shape: tuple[int, int], sigma: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((size, len(sigma))))[0] for size in shape)
    return ((u * sigma) @ v.T).astype(np.float32)


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (70, 70)])
@pytest.mark.parametrize("least", [0.5, 3e-5, 1e-6])
def test_by_formula_on_graded_spectra(method: str, count: int, shape: tuple[int, int], least: float) -> None:
    """Weak directions count as much as strong ones here, so every one of them has to be right."""
    sigma = np.geomspace(1, least, min(shape))
    experts = [with_spectrum(shape, sigma, seed) for seed in range(count)]
    base = np.zeros(shape, np.float32)
    want = by_formula(method, base, experts, 0.8)
    assert np.linalg.norm(merged_update(method, base, experts, lam=0.8) - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
def test_by_formula_on_a_large_graded_spectrum(method: str) -> None:
    shape = (2048, 512)
    experts = [with_spectrum(shape, np.geomspace(1, 3e-5, 512), seed) for seed in range(2 if method == "tsv" else 1)]
    base = np.zeros(shape, np.float32)
    want = by_formula(method, base, experts)
    assert np.linalg.norm(merged_update(method, base, experts) - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-5])
@pytest.mark.parametrize("count", [2, 5])
def test_tsv_in_float32_is_no_worse_than_plain_float32(count: int, apart: float) -> None:
    """Large matrices, of experts that differ in everything down to hardly anything: there float64 has to do."""
    rng = np.random.default_rng(0)
    shape = (300, 260)
    common = rng.standard_normal(shape)
    experts = [((1 - apart) * common + apart * rng.standard_normal(shape)).astype(np.float32) for _ in range(count)]
    base = np.zeros(shape, np.float32)
    want = by_formula("tsv", base, experts)
    error = np.linalg.norm(merged_update("tsv", base, experts) - want) / np.linalg.norm(want)
    assert error <= 1e-5
    if apart == 1:
        assert error > 1e-8, "float32 has been used"


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
def test_by_formula_on_deltas_of_low_rank_and_rounding(method: str) -> None:
    """What a short training leaves: a few directions, and the rounding of the weights in all others."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((80, 64)).astype(np.float32)
    experts = [base + with_spectrum(base.shape, np.geomspace(0.1, 1e-3, 6), seed) for seed in range(2)]
    want = by_formula(method, base, experts)
    got = merged_update(method, base, experts)
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want) + 2.0**-24 * np.linalg.norm(base)


def test_iso_c_is_continuous_down_to_zero() -> None:
    """The directions of a diagonal matrix do not move when a singular value falls, exactly: nothing may jump."""
    base, order = np.zeros((48, 48), np.float32), np.random.default_rng(1).permutation(48)
    for weakest in np.geomspace(1e-2, 1e-14, 25):
        sigma = np.geomspace(1, weakest, 48).astype(np.float32)
        got = merged_update("iso_c", base, [np.diag(sigma)[order]])
        want = sigma.astype(np.float64).mean() * np.eye(48)[order]
        assert np.abs(got - want).max() <= 1e-6 * sigma.mean(), f"smallest singular value {weakest:.1e}"
    sigma[-5:] = 0, 0, 1e-16, 1e-20, 1e-30
    got = merged_update("iso_c", base, [np.diag(sigma)[order]])
    assert np.linalg.matrix_rank(got, tol=1e-3 * np.abs(got).max()) == 43, "what float64 cannot tell from 0 is left out"


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
def test_directions_that_an_expert_has_not_got_are_left_out(method: str) -> None:
    """Rows that were not trained: their singular values are 0, and no SVD says in which direction."""
    base = np.random.default_rng(2).standard_normal((40, 24)).astype(np.float32)
    experts = [base.copy() for _ in range(2)]
    for seed, expert in enumerate(experts):
        expert[:5] += with_spectrum((5, 24), np.geomspace(1, 0.1, 5), seed)
    got = merged_update(method, base, experts)
    assert (got[5:] == 0).all() and np.linalg.norm(got[:5] - by_formula(method, base, experts)[:5]) <= 1e-5


def as_defined(method: str, experts: list[np.ndarray], **settings: Any) -> np.ndarray:
    """The update by `definitions`, in float64."""
    base = np.zeros(experts[0].shape)
    parts = [Expert(str(t), x, x, x) for t, x in enumerate(x.astype(np.float64) for x in experts)]
    defaults = {p.name: p.default for p in METHODS[method].spec.parameters if p.scope == "global"}
    models = [{"weight": 1.0 if t else 0.7} for t in range(len(experts))]
    return merged(method, base, parts, models, defaults | settings, "w", 0).values


ODD: dict[str, list[np.ndarray]] = {
    "one expert": [with_spectrum((30, 20), np.geomspace(1, 0.1, 20), 0)],
    "wide": [with_spectrum((20, 30), np.geomspace(1, 0.1, 20), seed) for seed in range(3)],
    "more experts than directions": [with_spectrum((4, 3), np.geomspace(1, 0.5, 3), seed) for seed in range(7)],
    "twice the same": [with_spectrum((30, 20), np.geomspace(1, 0.1, 20), 0)] * 2,
    "low rank": [with_spectrum((30, 20), np.geomspace(1, 0.5, 2), seed) for seed in range(3)],
    "low rank, exactly": [np.outer(np.eye(16)[seed], np.ones(12)).astype(np.float32) for seed in range(3)],
    "a row": [np.full((1, 9), x, np.float32) for x in (1.0, -2.0)],
    "a column": [np.full((9, 1), x, np.float32) for x in (1.0, 2.0)],
    "one entry": [np.full((1, 1), x, np.float32) for x in (3.0, -1.0)],
    "one is the base": [with_spectrum((30, 20), np.geomspace(1, 0.1, 20), 0), np.zeros((30, 20), np.float32)],
    "tiny": [np.float32(1e-30) * with_spectrum((30, 20), np.geomspace(1, 0.1, 20), seed) for seed in range(2)],
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(
    ("method", "settings", "bound"),
    [
        ("iso_cts", {}, 1e-5),
        ("iso_cts", {"common": 0.3, "lambda": 0.7}, 1e-5),
        ("iso_cts", {"common": 1.0}, 1e-5),
        ("wudi", {}, 2e-5),
        ("wudi", {"towards": "mean", "ridge": 0.1}, 2e-5),
        ("wudi", {"ridge": 10.0, "lambda": 0.6}, 2e-5),
    ],
)
def test_by_definition(method: str, settings: dict[str, Any], bound: float, name: str) -> None:
    experts = ODD[name]
    want = as_defined(method, experts, **settings)
    weight = {f"t{t}": 1.0 if t else 0.7 for t in range(len(experts))}
    named = {"lam" if key == "lambda" else key: value for key, value in settings.items()}
    got = merged_update(method, np.zeros_like(experts[0]), experts, weight=weight, **named)
    assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want) and np.linalg.norm(want) > 0


@pytest.mark.parametrize("ridge", [0.002, 0.01, 0.1, 0.3])  # the first is divided in float64
@pytest.mark.parametrize("shape", [(96, 384), (384, 96), (256, 256)])
@pytest.mark.parametrize("power", [0.3, 1.0, 2.0, 4.0])
def test_wudi_is_as_exact_as_its_page_says(power: float, shape: tuple[int, int], ridge: float) -> None:
    """docs/methods.md: 2^-22 n / ridge, on spectra from flat to a single direction; 1e-5 for the flat ones of trainings."""
    experts = [with_spectrum(shape, np.arange(1, min(shape) + 1) ** -power, seed) for seed in range(3)]
    want = as_defined("wudi", experts, ridge=ridge)
    weight = {"t0": 0.7, "t1": 1.0, "t2": 1.0}
    got = merged_update("wudi", np.zeros(shape, np.float32), experts, weight=weight, ridge=ridge)
    bound = 2.0**-22 * shape[1] / ridge if power > 0.5 or ridge < 0.1 else 1e-5
    assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)


def test_a_ridge_leads_wudi_from_no_interference_to_its_goal() -> None:
    """Experts that read different inputs do not interfere: all of each is kept. A large ridge is task arithmetic."""
    rng = np.random.default_rng(0)
    experts = [np.zeros((12, 12), np.float32) for _ in range(3)]
    for t, expert in enumerate(experts):
        expert[:, 4 * t : 4 * t + 4] = rng.standard_normal((12, 4))
    got = merged_update("wudi", np.zeros((12, 12), np.float32), experts, towards="mean", ridge=0.01)
    assert np.linalg.norm(got - sum(experts)) <= 0.05 * np.linalg.norm(sum(experts))
    noise = [with_spectrum((12, 10), np.geomspace(1, 0.1, 10), seed) for seed in range(3)]
    for towards, want in (("sum", np.sum(noise, axis=0)), ("mean", np.mean(noise, axis=0))):
        got = merged_update("wudi", np.zeros((12, 10), np.float32), noise, towards=towards, ridge=1e6)
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_parts_are_those_of_lors_and_of_tsv() -> None:
    """Not orthogonal and with equal weights LoRS; without sparse parts TSV; and linear in all weights."""
    base, experts = states()
    chosen = {"target": {"include": ["q_proj"]}, "rest": "base"}
    lors_ = ours(base, experts, "lors", rank=3, density=0.3, weight=WEIGHTS, lam=0.6, **chosen)
    both = {"rank": 3, "density": 0.3, "orthogonal": False, "lam": 0.6, **chosen}
    assert_same(ours(base, experts, "lors_parts", weight=WEIGHTS, sparse_weight=WEIGHTS, **both), lors_, base)
    tsv = ours(base, experts, "tsv", weight=WEIGHTS, lam=0.6, **chosen)
    assert_same(ours(base, experts, "lors_parts", weight=WEIGHTS, sparse_weight=0.0, lam=0.6, **chosen), tsv, base)

    key = next(iter(SHAPES))
    alone = np.zeros_like(base[key])
    for part in ("weight", "sparse_weight"):
        for name in NAMES:
            own = {p: {n: float((p, n) == (part, name)) for n in NAMES} for p in ("weight", "sparse_weight")}
            alone += WEIGHTS[name] * (ours(base, experts, "lors_parts", **own, **chosen)[key] - base[key])
    together = ours(base, experts, "lors_parts", weight=WEIGHTS, sparse_weight=WEIGHTS, **chosen)[key] - base[key]
    assert np.linalg.norm(together - alone) <= 1e-5 * np.linalg.norm(together)
    with pytest.raises(LorsError, match=r"parameters.rank: expected at most min\(m, n\) = 48 .*q_proj"):
        ours(base, experts, "lors_parts", rank=49, **chosen)


@pytest.mark.parametrize("settings", [{}, {"alpha": 1.0}, {"alpha": 0.0, "ridge": 0.5}, {"lambda": 0.5}], ids=str)
def test_regmean_by_definition(settings: dict[str, Any]) -> None:
    base, experts = states()
    named = {"lam" if key == "lambda" else key: value for key, value in settings.items()}
    got = ours(base, experts, "regmean", config={"model_type": "llama"}, **parameters_of("regmean"), **named)
    defaults = {p.name: p.default for p in METHODS["regmean"].spec.parameters if p.scope == "global"}
    models = [{"weight": WEIGHTS[name], "statistics": made_up()[name]} for name in NAMES]
    for key in list(SHAPES)[:2]:
        deltas = [experts[name][key].astype(np.float64) - base[key] for name in NAMES]
        parts = [Expert(name, base[key] + delta, delta, delta) for name, delta in zip(NAMES, deltas, strict=True)]
        want = merged("regmean", base[key].astype(np.float64), parts, models, defaults | settings, key, 0).values
        assert np.linalg.norm(got[key] - want) <= 1e-6 * np.linalg.norm(want - base[key]) + 1e-7 * np.linalg.norm(want)


def test_regmean_gives_each_expert_its_own_inputs_back(tmp_path: Path) -> None:
    """Experts that read different inputs: the merged matrix does what each does, and its unread columns are the mean."""
    rng = np.random.default_rng(0)
    experts = [rng.standard_normal((9, 8)).astype(np.float32) for _ in range(2)]
    files = {}
    for t in range(2):
        mean = np.zeros((8, 8))
        mean[3 * t : 3 * t + 3, 3 * t : 3 * t + 3] = mean_square(3, t)
        write_statistics(tmp_path / f"t{t}", f"t{t}", "", {"q_proj.weight": "x"}, {"x": mean})
        files[f"t{t}"] = str(tmp_path / f"t{t}")
    got = merged_update("regmean", np.zeros((9, 8), np.float32), experts, statistics=files, ridge=1e-6)
    assert np.abs(got[:, :3] - experts[0][:, :3]).max() < 1e-3 and np.abs(got[:, 3:6] - experts[1][:, 3:6]).max() < 1e-3
    assert np.abs(got[:, 6:] - np.mean(experts, axis=0)[:, 6:]).max() < 1e-5


def test_a_recipe_finds_its_statistics_from_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = states()
    for name, state in {"base": base, **experts}.items():
        tiny.write(tmp_path / "in" / name, state)
    statistics(tmp_path / "in", NAMES, SHAPES)
    models = "".join(f"- model: {name}\n  parameters: {{statistics: {name}.stats.safetensors}}\n" for name in NAMES)
    recipe = f"merge_method: regmean\nbase_model: base\ntarget: {{include: proj}}\nmodels:\n{models}"
    (tmp_path / "in" / "r.yml").write_text(recipe)
    for recipe_file, out in (("in/r.yml", "out"), ("out/lors_recipe.yml", "elsewhere/again")):
        monkeypatch.chdir(tmp_path if out == "out" else "/")
        lors.merge_recipe(lors.Recipe.load(tmp_path / recipe_file, SPECS), tmp_path / out, durable=False, check=True)
    first, again = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "elsewhere/again"))
    assert first == again


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "wudi"])
def test_experts_without_a_difference_leave_the_base(method: str) -> None:
    base, experts = states()
    merged = ours(base, {"x": base, "y": base}, method)
    assert all((merged[key] == base[key]).all() for key in base)
    alone, beside = (ours(base, {"x": experts["x"]} | more, method, rest="base") for more in ({}, {"y": base}))
    name = "model.layers.0.mlp.up_proj.weight"
    if method in ("iso_c", "wudi"):
        assert (alone[name] == beside[name]).all(), "an expert that is the base adds nothing"
    elif method == "tsv":
        assert np.linalg.matrix_rank(beside[name] - base[name], tol=1e-4) == 20, "one of two has half of the triplets"


def test_attention_only() -> None:
    """A method that treats all tensors alike is confined by a target, here to attention; `rest` decides on the others."""
    base, experts = states()
    attention, mlp = list(SHAPES)[:2]
    everywhere = ours(base, experts, "ties", density=0.4)
    chosen = {"target": {"select": "attention"}, "config": {"model_type": "llama"}}
    merged = ours(base, experts, "ties", density=0.4, rest="base", **chosen)
    assert (merged[attention] == everywhere[attention]).all() and (merged[mlp] == base[mlp]).all()
    average = ours(base, experts, "ties", density=0.4, rest="average", **chosen)
    np.testing.assert_allclose(average[mlp], sum(s[mlp] for s in experts.values()) / 3, atol=1e-6)
    arithmetic = ours(base, experts, "ties", density=0.4, lam=0.5, **chosen)
    np.testing.assert_allclose(
        arithmetic[mlp], base[mlp] + 0.5 * sum(s[mlp] - base[mlp] for s in experts.values()), atol=1e-6
    )


EVERY = sorted(set(METHODS) - {"linear", "slerp"})


LARGE = {"model.layers.0.self_attn.q_proj.weight": (512, 512)}


@functools.cache
def made_up(large: bool = False) -> dict[str, str]:
    """Files of statistics for the experts of `states`, or of `large`."""
    root = Path(tempfile.mkdtemp(prefix="lors-test-"))
    atexit.register(shutil.rmtree, root)
    return statistics(root, tuple(f"x{t}" for t in range(6)), LARGE) if large else statistics(root, NAMES, SHAPES)


def parameters_of(method: str) -> dict[str, Any]:
    known = {p.name for p in METHODS[method].spec.parameters}
    settings = {"density": 0.4, "rank": 3, "weight": WEIGHTS, "statistics": made_up()}
    return {key: value for key, value in settings.items() if key in known}


@pytest.mark.parametrize("method", EVERY)
def test_rest_of_every_method(method: str) -> None:
    """What a target leaves out follows `rest`, whichever the method; what is in it does not."""
    base, experts = states()
    chosen, *others = SHAPES
    settings = {"target": {"include": ["q_proj"]}, **parameters_of(method)}
    spec = METHODS[method].spec
    lam = getattr(spec.parameter("lambda"), "default", 1.0)
    weights = WEIGHTS if spec.parameter("weight") else dict.fromkeys(NAMES, 1.0)
    merged = {
        rest: ours(base, experts, method, rest=rest, **settings) for rest in ("task_arithmetic", "average", "base")
    }
    assert all((state[chosen] == merged["base"][chosen]).all() for state in merged.values())
    assert (merged["base"][chosen] != base[chosen]).any()
    for key in others:
        deltas = {name: experts[name][key] - base[key] for name in NAMES}
        wanted = {
            "task_arithmetic": base[key] + lam * sum(weights[name] * deltas[name] for name in NAMES),
            "average": base[key] + sum(deltas.values()) / 3,
            "base": base[key],
        }
        for rest, want in wanted.items():
            np.testing.assert_allclose(merged[rest][key], want, atol=1e-6, err_msg=f"{rest}: {key}")
    silent, default = (
        ours(base, experts, method, **settings),
        METHODS[method].spec.rest,
    )
    assert all((silent[key] == merged[default][key]).all() for key in SHAPES)
    own = {rest: ours(base, experts, method, rest=rest, rest_lambda=0.3, **settings) for rest in list(merged)[:2]}
    for key in others:
        deltas = {name: experts[name][key] - base[key] for name in NAMES}
        wanted = {
            "task_arithmetic": base[key] + 0.3 * sum(weights[name] * deltas[name] for name in NAMES),
            "average": base[key] + 0.3 * sum(deltas.values()) / 3,
        }
        for rest, want in wanted.items():
            np.testing.assert_allclose(own[rest][key], want, atol=1e-6, err_msg=f"{rest}: {key}")
            assert (own[rest][chosen] == silent[chosen]).all()


@pytest.mark.parametrize("said", [{"rest": "base"}, {"rest": "average"}, {"rest_lambda": 0.5}])
@pytest.mark.parametrize("method", [method for method in EVERY if METHODS[method].everywhere])
def test_what_is_said_of_the_rest_confines_a_method_to_the_projections(method: str, said: dict[str, Any]) -> None:
    base, experts = states()
    chosen = {"config": {"model_type": "llama"}, **parameters_of(method)}
    merged = ours(base, experts, method, **said, **chosen)
    want = ours(base, experts, method, target={}, **said, **chosen)
    everywhere = ours(base, experts, method, **chosen)
    for key in base:
        assert (merged[key] == want[key]).all()
        assert (merged[key] == everywhere[key]).all() == (key in list(SHAPES)[:2]), key


def test_lambda_of_the_rest_by_name() -> None:
    base, experts = states()
    mu = [{"filter": "conv", "value": 0.0}, {"value": 2.0}]
    merged = ours(base, experts, "lors", rest="average", rest_lambda=mu, config={"model_type": "llama"})
    mean = np.mean([experts[name]["norm.weight"] - base["norm.weight"] for name in NAMES], axis=0)
    assert (merged["conv.weight"] == base["conv.weight"]).all()
    np.testing.assert_allclose(merged["norm.weight"], base["norm.weight"] + 2 * mean, atol=1e-6)


# --- random numbers, chunks, backends --------------------------------------------------------------------------------


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that do not fit, so that all experts are read a few entries at a time."""
    monkeypatch.setattr(operands, "BUDGET", 1)
    monkeypatch.setattr(operands, "STRIP", 1)
    monkeypatch.setattr(operands, "COLUMNS", 24)
    monkeypatch.setattr("lors.methods.della_linear.ROWS", 1)
    assert ROWS > 1


@pytest.mark.parametrize("method", EVERY)
def test_chunks_and_threads_change_nothing(
    method: str, tiny_chunks: Iterator[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = states()
    settings = parameters_of(method)
    chunked = [ours(base, experts, method, threads=threads, **settings) for threads in (1, 3)]
    monkeypatch.undo()
    whole = ours(base, experts, method, **settings)
    for key in base:
        assert (chunked[0][key] == chunked[1][key]).all()
        np.testing.assert_allclose(chunked[0][key], whole[key], atol=2e-6)
        if method not in ("model_stock", "dare_linear", "dare_ties"):  # these carry a sum, whose order chunks change
            assert (chunked[0][key] == whole[key]).all()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and six experts of it in files: a projection and an embedding of 1 MB each."""
    root = tmp_path_factory.mktemp("large")
    shapes = {"model.layers.0.self_attn.q_proj.weight": (512, 512), "model.embed_tokens.weight": (2048, 128)}
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    tiny.write(root / "base", base)
    for t in range(6):
        state = {name: x + np.float32(0.1) * rng.standard_normal(x.shape, np.float32) for name, x in base.items()}
        tiny.write(root / f"x{t}", state)
    return root


@pytest.mark.parametrize("method", EVERY)
def test_memory_does_not_depend_on_the_number_of_experts(
    method: str, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For tensors that are too large to be held with all experts, here from 1 MB on."""
    monkeypatch.setattr(operands, "BUDGET", 1 << 18)
    monkeypatch.setattr(operands, "STRIP", 1 << 17)
    monkeypatch.setattr("lors.methods.della_linear.ROWS", 1 << 15)
    settings = {key: value for key, value in parameters_of(method).items() if key != "weight"}
    if "statistics" in settings:
        made_up(large=True)

    def peak(count: int) -> int:
        experts = {f"x{t}": large / f"x{t}" for t in range(count)}
        out = tmp_path / str(count)
        if "statistics" in settings:
            settings["statistics"] = {name: made_up(large=True)[name] for name in experts}
        tracemalloc.start()
        lors.merge(large / "base", experts, out, method, threads=1, durable=False, **settings)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(2)  # what is imported or cached on first use is no part of it
    shutil.rmtree(tmp_path / "2")
    two, six = peak(2), peak(6)
    assert two > 1 << 20 and six - two < 150_000, f"{two} bytes with 2 experts, {six} with 6"


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_numbers_belong_to_seed_expert_and_tensor(method: str) -> None:
    base, experts = states()
    settings = {"density": 0.4, "rescale": False}
    first = ours(base, experts, method, **settings)
    backwards = {name: dict(reversed(experts[name].items())) for name in reversed(NAMES)}
    again = ours(dict(reversed(base.items())), backwards, method, **settings)
    other = ours(base, experts, method, seed=1, **settings)
    for key in base:  # the order of the experts changes the last bit of a sum, never what is kept
        np.testing.assert_allclose(first[key], again[key], atol=1e-6)
        assert (first[key] != other[key]).any()


@pytest.mark.parametrize("method", EVERY)
def test_backends_agree(method: str) -> None:
    base, experts = states()
    results = [
        ours(base, experts, method, backend=backend, **parameters_of(method)) for backend in ("cpu", "reference")
    ]
    for key in base:
        np.testing.assert_allclose(results[0][key], results[1][key], atol=5e-6)


@pytest.mark.parametrize("method", EVERY)
def test_half_precision(method: str) -> None:
    import ml_dtypes

    base, experts = states()
    halves = [{k: v.astype(ml_dtypes.bfloat16) for k, v in state.items()} for state in (base, *experts.values())]
    full = [{k: v.astype(np.float32) for k, v in state.items()} for state in halves]
    settings = parameters_of(method)
    got = ours(halves[0], dict(zip(NAMES, halves[1:], strict=True)), method, **settings)
    want = ours(full[0], dict(zip(NAMES, full[1:], strict=True)), method, **settings)
    for key in base:
        assert (got[key] == want[key].astype(ml_dtypes.bfloat16)).all()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("boost", [{}, {"boost": 0.5}, {"boost_merged": 0.5}], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_values_name_the_expert(method: str, value: float, boost: dict[str, float]) -> None:
    base, experts = states()
    for key in base:
        experts["y"][key].ravel()[7] = value
    with pytest.raises(LorsError, match=r"^y: tensor '.*': expected finite values, got 1 NaN or infinite$"):
        ours(base, experts, method, config={"model_type": "llama"}, **parameters_of(method), **boost)


@pytest.mark.parametrize(
    "method,settings,message",
    [
        ("ties", {"densty": 0.3}, "unknown parameter 'densty' of method ties.*density"),
        ("ties", {"density": 1.5}, r"parameters.density: expected a number in \[0, 1\], got 1.5"),
        ("ties", {"gamma": 0.1}, "unknown parameter 'gamma' of method ties"),
        ("breadcrumbs", {"gamma": -1}, r"gamma: expected a number in \[0, 1\]"),
        ("della", {"density": 0.1}, "epsilon: expected density - epsilon > 0"),
        ("dare_ties", {"normalize": "yes"}, "normalize: expected true or false"),
        ("task_arithmetic", {"density": 0.5}, "unknown parameter 'density' of method task_arithmetic"),
        ("slerp", {"t": 0.5}, "models: expected 1 besides the base for method slerp, got 3"),
        ("linear", {"weight": 1.0, "target": {"select": "attention"}}, "treats all tensors alike, expected no target"),
        ("linear", {"weight": 1.0, "rest": "base"}, "^rest: method linear treats all tensors alike, expected no rest$"),
        ("linear", {"weight": 1.0, "rest_lambda": 1.0}, "unknown parameter 'rest_lambda' of method linear"),
        ("ties", {"rest": "base", "rest_lambda": 0.5}, "rest_lambda: expected no value with rest: base"),
        ("regmean", {}, r"statistics: missing for tensor .* of x, and statistics has no default"),
        ("regmean", {"statistics": {"x": 3, "y": "f", "z": "f"}}, "statistics: expected the path of a file, got 3"),
        ("regmean", {"statistics": "/nowhere"}, "^/nowhere: expected a file of statistics, there is none$"),
        ("lors", {"boost": 1.5}, r"boost: expected a number in \[0, 1\], got 1.5"),
        ("tsv", {"boost_merged": {"x": 0.5}}, "boost_merged is one value for the whole merge"),
        ("linear", {"weight": 1.0, "boost": 0.5}, "unknown parameter 'boost' of method linear"),
        ("lors", {"rest_lambda": "much"}, "rest_lambda: expected a number, got 'much'"),
        ("lors", {"rest_lambda": {"x": 0.5}}, "rest_lambda is one value for the whole merge"),
        ("tiess", {}, "unknown method 'tiess'.*ties"),
    ],
)
def test_bad_parameters(method: str, settings: dict[str, Any], message: str) -> None:
    base, experts = states()
    with pytest.raises(LorsError, match=message):
        ours(base, experts, method, **settings)


def test_too_few_or_too_many_experts() -> None:
    base, experts = states()
    with pytest.raises(LorsError, match="expected at least 2 besides the base for method model_stock, got 1"):
        ours(base, {"x": experts["x"]}, "model_stock")
    with pytest.raises(LorsError, match="missing for tensor .*t has no default"):
        ours(base, {"x": experts["x"]}, "slerp")
    small = {"w.weight": np.zeros((2, 9), np.float32)}
    many = {name: {"w.weight": np.ones((2, 9), np.float32)} for name in "abc"}
    with pytest.raises(LorsError, match="expected at most 2 experts for a matrix"):
        ours(small, many, "tsv", target={"include": ["."]})


def test_the_expectation_of_della_depends_on_magnitude() -> None:
    """docs/methods.md: at density 0.5 and epsilon 0.15, 0.62 of delta for the smallest normal entries, 1.16 for the largest."""
    delta = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    base, expert = {"x": np.zeros_like(delta)}, {"x": delta}
    runs = [
        lors.merge_state_dicts(base, {"a": expert}, "della_linear", density=0.5, epsilon=0.15, lam=1.0, seed=seed)["x"]
        for seed in range(60)
    ]
    order = np.argsort(np.abs(delta))
    kept, magnitude = np.mean(np.abs(runs), axis=0)[order], np.abs(delta)[order]
    share = [
        float(kept[part].sum() / magnitude[part].sum()) for part in (slice(0, 500), slice(-500, None), slice(None))
    ]
    assert share == pytest.approx([0.62, 1.16, 1.0], abs=0.03)


def test_every_method_is_in_the_documents() -> None:
    root = Path(__file__).parents[2]
    table = re.findall(r"^\| (`.*?) \|", (root / "docs" / "methods.md").read_text(encoding="utf-8"), re.M)
    assert set(METHODS) <= {name for row in table for name in re.findall(r"`(\w+)`", row)}
    listed = (root / "README.md").read_text(encoding="utf-8").partition("\nMethods: ")[2].partition("\n\n")[0]
    assert set(METHODS) <= set(re.findall(r"`(\w+)`", listed))
