"""truncated_svd at rank 7, certified to 1e-5, against LAPACK through torch and against svd_lowrank (error beside time).

Counted bytes: base and tuned once per pass; a pass after the first finds them in the cache where the matrix fits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import lors_kernels
from lors_kernels.testing.cases import SHAPES

from .inputs import DTYPES, RANK, Inputs, copies, make_inputs, time_call
from .released import full_svd, lowrank_svd, thin_svd

RIVALS = {
    "torch full SVD": full_svd,
    "torch thin SVD": thin_svd,
    "torch svd_lowrank": lowrank_svd(RANK + 8, 2),
}


@lru_cache(maxsize=1)
def truth(inputs: Inputs) -> Tensor:
    return thin_svd(inputs.delta.double(), RANK)


def error_of(low: Tensor, inputs: Inputs) -> float:
    """Relative, against a float64 SVD."""
    return float((low - truth(inputs)).norm() / truth(inputs).norm())


@pytest.mark.parametrize("impl", ["cpu", *RIVALS])
@pytest.mark.parametrize("deltas", ["powerlaw", "flat"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_truncated_svd(benchmark: Any, shape: str, dtype: str, deltas: str, impl: str) -> None:
    if impl != "cpu" and dtype != "float32":
        pytest.skip("torch decomposes in float32 whatever the checkpoint's dtype: same time")
    inputs = make_inputs(SHAPES[shape], dtype, deltas=deltas)

    def ours(pair: Inputs) -> Any:
        return lors_kernels.truncated_svd(pair.base, pair.tuned[0], RANK, backend="cpu")

    def rival(pair: Inputs) -> Tensor:
        return RIVALS[impl](pair.delta, RANK)

    passes = 1
    if impl == "cpu":
        found = ours(inputs)
        passes = found.passes
        error = error_of(found.left @ found.right.T, inputs)
        assert error <= 1e-5, f"truncated_svd: expected a relative error of at most 1e-5, got {error:.1e}"
    else:
        torch.manual_seed(0)
        error = error_of(rival(inputs), inputs)
    time_call(
        benchmark,
        copies(inputs, cold=True),
        ours if impl == "cpu" else rival,
        nbytes=passes * inputs.nbytes,
        rounds=20 if impl == "cpu" else 3,
        passes=passes,
        error=error,
    )
