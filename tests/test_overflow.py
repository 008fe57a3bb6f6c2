"""What the written type cannot hold is refused, whatever the type, the method and the way of the merge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lors
from lors import LorsError
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


def test_a_factor_beyond_float32_is_refused() -> None:
    base, tuned = pair("float32")
    for settings in ({"lam": 1e308}, {"lam": 1.0, "weight": {"a": 1e39}}, {"lam": 1e30, "weight": {"a": 1e30}}):
        with pytest.raises(LorsError) as error:
            lors.merge_state_dicts(base, {"a": tuned}, "task_arithmetic", **settings)
        assert "float32" in str(error.value)
