"""Sums of updates are rounded once: every way to merge is within one unit in the last place, however many experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import lors
import tiny
from lors.checkpoints.reader import open_checkpoint
from lors.experts.decompose import decompose
from lors.merging.edit import edit

State = dict[str, np.ndarray]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DIGITS = {"float32": 24, "float16": 11, "bfloat16": 8}
MATRIX, NORM, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "norm.weight", "model.embed_tokens.weight"
SHAPES = {MATRIX: (40, 33), NORM: (301,), EMBEDDING: (50, 20)}


def ulp(x: np.ndarray, dtype: str) -> np.ndarray:
    """The distance between numbers of the type at x (normal ones)."""
    return 2.0 ** (np.floor(np.log2(np.abs(x))) - DIGITS[dtype] + 1)


def family(count: int, dtype: str) -> tuple[State, dict[str, State]]:
    """Weights from 1 to 2, whose last place is the largest for their size, and experts that moved by a thousandth."""
    rng = np.random.default_rng(count)
    base = {key: rng.uniform(1, 2, shape).astype(DTYPES[dtype]) for key, shape in SHAPES.items()}
    return base, {
        f"t{t}": {
            key: (x.astype(np.float64) * rng.normal(1, 2e-3, x.shape)).astype(DTYPES[dtype]) for key, x in base.items()
        }
        for t in range(count)
    }


def f64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def assert_rounded_once(
    got: State, want: Mapping[str, np.ndarray], sizes: Mapping[str, np.ndarray], count: int
) -> None:
    """want: the exact result; sizes: the sum of the magnitudes of what was added to the base, in float32."""
    for key, exact in want.items():
        dtype = str(got[key].dtype)
        error = np.abs(f64(got[key]) - exact) / ulp(exact, dtype)
        assert error.max() <= 1, f"{key}: {error.max():.2f} units in the last place"
        once = 0.5 + (0 if dtype == "float32" else 2.0 ** (DIGITS[dtype] - 24))
        summing = (count + 4) * 2.0**-24 * sizes[key] / ulp(exact, dtype)
        assert (error <= once + summing).all(), f"{key}: more than one rounding and the sum's own"


def by_weights(base: State, experts: Mapping[str, State], weights: Mapping[str, float]) -> tuple[State, State]:
    """(W0 + sum_t w_t delta_t, sum_t |w_t delta_t|) in float64."""
    terms = {key: [weights[t] * (f64(state[key]) - f64(x)) for t, state in experts.items()] for key, x in base.items()}
    return (
        {key: f64(x) + np.sum(terms[key], axis=0) for key, x in base.items()},
        {key: np.abs(terms[key]).sum(axis=0) for key in base},
    )


# Each of these is lambda times the weighted sum of all differences: nothing is left out at density 1.
SUMS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "lors": {"rank": 3, "density": 1.0},
    "magnitude_prune": {"density": 1.0},
    "dare_linear": {"density": 1.0},
    "della_linear": {"density": 1.0},
    "breadcrumbs": {"density": 1.0},
}


@pytest.mark.parametrize("place", ["cpu", "device", "resident"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 25])
@pytest.mark.parametrize("method", SUMS)
def test_weighted_sums(method: str, count: int, dtype: str, place: str) -> None:
    base, experts = family(count, dtype)
    weights = {name: 0.3 * (-1) ** t * (1 + t / 7) for t, name in enumerate(experts)}
    settings = {**SUMS[method], "lam": 0.5, "weight": {name: weight / 0.5 for name, weight in weights.items()}}
    if place == "cpu":
        got = lors.merge_state_dicts(base, experts, method, threads=1, **settings)
    elif place == "device":
        got = lors.merge_state_dicts(base, experts, method, device="cpu", **settings)
    else:
        got = resident(base, experts, method, **settings)
    assert_rounded_once(got, *by_weights(base, experts, weights), count)


def resident(base: State, experts: Mapping[str, State], method: str, **settings: Any) -> State:
    """The merge of torch tensors where they are."""
    from lors_kernels.arrays import to_torch

    base, *others = ({key: to_torch(x) for key, x in state.items()} for state in (base, *experts.values()))
    merged = lors.merge_state_dicts(base, dict(zip(experts, others, strict=True)), method, device="cpu", **settings)
    return {
        key: x.view(dtype=__import__("torch").uint16).numpy().view(ml_dtypes.bfloat16)
        if "bfloat16" in str(x.dtype)
        else x.numpy()
        for key, x in merged.items()
    }


@pytest.mark.parametrize("place", ["cpu", "resident"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 25])
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(normalize: bool, count: int, dtype: str, place: str) -> None:
    """Weights that sum to 1, and weights whose sum float32 has not got."""
    base, experts = family(count, dtype)
    weights = {name: 0.1 + t / 7 for t, name in enumerate(experts)}
    merge = lors.merge_state_dicts if place == "cpu" else resident
    got = merge(base, experts, "linear", weight=weights, normalize=normalize)
    total = sum(weights.values()) if normalize else 1.0
    want = {key: sum(w / total * f64(experts[t][key]) for t, w in weights.items()) for key in base}
    first = experts["t0"]
    sizes = {
        key: sum(w / total * np.abs(f64(experts[t][key]) - f64(first[key])) for t, w in weights.items()) for key in base
    }
    assert_rounded_once(got, want, sizes, count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["ties", "model_stock", "slerp"])
def test_what_is_no_weighted_sum(method: str, dtype: str) -> None:
    count = 1 if method == "slerp" else 9
    base, experts = family(count, dtype)
    got = lors.merge_state_dicts(base, experts, method, **({"t": 0.4} if method == "slerp" else {}))
    want, sizes = {}, {}
    for key, x in base.items():
        deltas = np.stack([f64(state[key]) - f64(x) for state in experts.values()])
        if method == "slerp":  # almost parallel: a line
            want[key], sizes[key] = f64(x) + 0.4 * deltas[0], np.zeros(x.shape)
        elif method == "ties":
            agrees = np.sign(deltas) == np.where(deltas.sum(axis=0) >= 0, 1, -1)
            update = (deltas * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)
            want[key], sizes[key] = f64(x) + update, np.abs(deltas).sum(axis=0)
        else:
            flat = deltas.reshape(count, -1)
            gram = flat @ flat.T
            norms = np.sqrt(np.diag(gram))
            cosine = (gram / np.outer(norms, norms))[np.triu_indices(count, 1)].mean()
            t = count * cosine / (1 + (count - 1) * cosine)
            want[key], sizes[key] = f64(x) + t * deltas.mean(axis=0), np.abs(deltas).sum(axis=0)
    assert_rounded_once(got, want, sizes, count)


# --- expert files, and editing in place


@pytest.fixture
def files(tmp_path: Path) -> tuple[dict[str, Path], dict[str, str], State, dict[str, State]]:
    base, experts = family(6, "float32")
    paths = {name: tiny.write(tmp_path / name, state) for name, state in {"base": base, **experts}.items()}
    exact = {"values": "float32", "remainder": "float32", "rank": 2, "density": 1.0, "target": {"include": ["q_proj"]}}
    stored = {
        name: decompose(paths["base"], paths[name], tmp_path / f"{name}.lors.safetensors", name=name, **exact).path
        for name in experts
    }
    return paths, stored, base, experts


def load(path: Path) -> State:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


SETTINGS: dict[str, Any] = {"rank": 2, "density": 1.0, "lam": 0.3, "target": {"include": ["q_proj"]}}


@pytest.mark.parametrize("dtype", DTYPES)
def test_expert_files(files: Any, tmp_path: Path, dtype: str) -> None:
    paths, stored, base, experts = files
    lors.merge(paths["base"], stored, tmp_path / "out", out_dtype=dtype, **SETTINGS)
    want, sizes = by_weights(base, experts, dict.fromkeys(experts, 0.3))
    assert_rounded_once(load(tmp_path / "out"), want, sizes, len(experts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_and_remove_round_once_each(files: Any, tmp_path: Path, dtype: str) -> None:
    """The model that was merged is rounded, and so is every edit: half a unit each, and no drift."""
    paths, stored, base, experts = files
    *most, last = experts
    lors.merge(paths["base"], {name: stored[name] for name in most}, tmp_path / "out", out_dtype=dtype, **SETTINGS)
    first = load(tmp_path / "out")
    edit(tmp_path / "out", stored[last])
    grown = load(tmp_path / "out")
    want, sizes = by_weights(base, experts, dict.fromkeys(experts, 0.3))
    for key, exact in want.items():
        bound = 1 + (len(experts) + 4) * 2.0**-24 * sizes[key] / ulp(exact, dtype)
        assert (np.abs(f64(grown[key]) - exact) / ulp(exact, dtype) <= bound).all(), key
    edit(tmp_path / "out", stored[last], remove=True)
    back = load(tmp_path / "out")
    assert all((np.abs(f64(back[key]) - f64(first[key])) <= ulp(f64(first[key]), dtype)).all() for key in first)
    for _ in range(10):
        edit(tmp_path / "out", stored[last])
        edit(tmp_path / "out", stored[last], remove=True)
    again = load(tmp_path / "out")
    assert all((again[key] == back[key]).all() for key in back), "to and fro between the same two models"
