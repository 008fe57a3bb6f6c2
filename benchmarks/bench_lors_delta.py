"""lors_delta: L + S of one matrix, against a truncated full SVD and a `topk` mask of plain torch.

Counted bytes: the passes of the decomposition, one of the selection and one of the sum over delta, and out.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from torch import Tensor

import lors_kernels
from lors_kernels.testing import plain
from lors_kernels.testing.cases import SHAPES

from .inputs import DENSITY, RANK, Inputs, copies, make_inputs, time_call


@lru_cache(maxsize=1)
def truth(inputs: Inputs) -> Tensor:
    return plain.lors_delta(inputs.base.double(), RANK, DENSITY)


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("cache", ["cold"])
@pytest.mark.parametrize("deltas", ["powerlaw", "flat"])
@pytest.mark.parametrize("dtype", ["float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_lors_delta(benchmark: Any, shape: str, dtype: str, deltas: str, cache: str, impl: str) -> None:
    m, n = SHAPES[shape]
    inputs = Inputs(made(m, n, deltas), [])  # `base` is what is decomposed

    def ours(delta: Tensor) -> Any:
        return lors_kernels.lors_delta(delta, RANK, DENSITY, backend="cpu")

    found = ours(inputs.base)
    error = float((found - truth(inputs)).norm() / truth(inputs).norm())
    # 1e-5 of L, and the entries near the threshold that this moves across it: each is as large as the threshold.
    assert error <= 1e-2, f"lors_delta: expected a relative error of at most 1e-2, got {error:.1e}"
    passes = lors_kernels.truncated_svd(None, inputs.base, RANK, backend="cpu").passes if impl == "cpu" else 1
    time_call(
        benchmark,
        copies(inputs, cache == "cold"),
        lambda pair: ours(pair.base) if impl == "cpu" else plain.lors_delta(pair.base, RANK, DENSITY),
        nbytes=(passes + 3) * inputs.nbytes,
        rounds=20 if impl == "cpu" else 3,
        passes=passes,
        error=error,
    )


@lru_cache(maxsize=1)
def made(m: int, n: int, deltas: str) -> Tensor:
    return make_inputs((m, n), "float32", deltas=deltas).delta
