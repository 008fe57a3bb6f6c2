"""What the written type cannot hold is refused, whatever the type, the method and the way of the merge."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import lors
from lors import LorsError
from lors.interference import interference
from lors.task_vector import decompose
from lors_kernels.arrays import BFLOAT16

NAME = "model.decoder.layers.0.fc1.weight"
LARGE = {"float32": 3e38, "bfloat16": 3e38, "float16": 6e4}
TYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
METHODS: dict[str, dict[str, Any]] = {
    "lors": {"rank": 1, "density": 0.5, "lam": 1.0},
    "task_arithmetic": {"lam": 1.0},
    "ties": {"density": 1.0, "lam": 1.5},
    "dare_linear": {"density": 0.5, "lam": 1.0},
    "linear": {"normalize": False, "weight": {"a": 1.0, "b": 1.0}},
}


def pair(dtype: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A base, and a model whose difference fits the type while base + 1.5 differences do not."""
    rng = np.random.default_rng(0)
    base = (LARGE[dtype] * 0.5 * rng.choice([-1.0, 1.0], (24, 16))).astype(TYPES[dtype])
    return {NAME: base}, {NAME: (base.astype(np.float64) * 1.9).astype(TYPES[dtype])}


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", TYPES)
def test_overflow_is_one_line(dtype: str, method: str, device: str | None) -> None:
    base, tuned = pair(dtype)
    with pytest.raises(LorsError, match=rf"tensor '{NAME}': ") as error:
        lors.merge_state_dicts(base, {"a": tuned, "b": tuned}, method, device=device, **METHODS[method])
    assert "\n" not in str(error.value)
    assert "reach" in str(error.value) or "overflows" in str(error.value), str(error.value)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_fits_is_merged(dtype: str) -> None:
    base, tuned = pair(dtype)
    merged = lors.merge_state_dicts(base, {"a": tuned}, "task_arithmetic", lam=1.0)[NAME]
    assert np.isfinite(merged.astype(np.float32)).all()


def test_a_decomposition_beyond_float32_is_refused(tmp_path: Path) -> None:
    """delta is finite, and so is every singular vector; their product with a singular value is not."""
    base = tiny.tensors(0, 0.5)
    tuned = {name: value.copy() for name, value in base.items()}
    tuned["model.encoder.layers.0.fc1.weight"][:] = 2e38
    origin, model = tiny.write(tmp_path / "base", base), tiny.write(tmp_path / "a", tuned)
    commands: list[Callable[[], object]] = [
        lambda: lors.merge(origin, {"a": model}, tmp_path / "out"),
        lambda: lors.merge(origin, {"a": model}, tmp_path / "out", device="cpu"),
        lambda: decompose(origin, model, tmp_path / "a.lors.safetensors"),
        lambda: interference(origin, {"a": model, "b": origin}),
    ]
    for command in commands:
        with pytest.raises(LorsError) as error:
            command()
        assert re.fullmatch(
            r"\S+: tensor 'model.encoder.layers.0.fc1.weight': its decomposition overflows float32: "
            r"\d+ entries of singular vectors times values",
            str(error.value),
        ), str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_a_factor_beyond_float32_is_refused() -> None:
    base, tuned = pair("float32")
    for settings in ({"lam": 1e308}, {"lam": 1.0, "weight": {"a": 1e39}}, {"lam": 1e30, "weight": {"a": 1e30}}):
        with pytest.raises(LorsError) as error:
            lors.merge_state_dicts(base, {"a": tuned}, "task_arithmetic", **settings)
        assert "float32" in str(error.value)
