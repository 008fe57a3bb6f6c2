"""ties_update over 5 experts: trim, elect signs, disjoint mean in one pass, against the same steps of plain torch.

The thresholds are given: `residual_threshold` is timed by itself. Counted bytes: base, every expert and out read once, out
written once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import lors_kernels
from lors_kernels.testing import plain
from lors_kernels.testing.cases import SHAPES
from lors_kernels.types import Keep

from .inputs import DENSITY, DTYPES, EXPERTS, LAMBDA, Inputs, close, copies, make_inputs, time_call


@lru_cache(maxsize=1)
def prepare(m: int, n: int, dtype: str) -> tuple[Inputs, list[lors_kernels.Threshold]]:
    inputs = make_inputs((m, n), dtype, EXPERTS)
    k = int(m * n * DENSITY)
    return inputs, [lors_kernels.residual_threshold(inputs.base, x, k=k, backend="cpu") for x in inputs.tuned]


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("cache", ["cold"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ties_update(benchmark: Any, shape: str, dtype: str, cache: str, impl: str) -> None:
    m, n = SHAPES[shape]
    inputs, thresholds = prepare(m, n, dtype)
    keep, values = [Keep(low=threshold) for threshold in thresholds], [threshold.value for threshold in thresholds]

    def ours(out: Tensor, pair: Inputs) -> Any:
        return lors_kernels.ties_update(out, pair.base, pair.tuned, keep, [1.0] * EXPERTS, scale=LAMBDA, backend="cpu")

    found = torch.zeros(m, n)
    ours(found, inputs)
    truth, naive = (
        plain.ties_update(torch.zeros(m, n, dtype=d), inputs.base, inputs.tuned, values, LAMBDA)
        for d in (torch.float64, torch.float32)
    )
    # Of magnitudes equal to the threshold the kernel keeps the first; where kept entries cancel, a rounding elects the sign.
    apart = (found - truth).abs() > 1e-3 * LAMBDA * min(values)
    assert int(apart.sum()) <= 1e-3 * m * n, f"ties_update: {int(apart.sum())} entries differ"
    close(found[~apart], truth[~apart], naive[~apart], "ties_update")
    out = inputs.base.float()
    time_call(
        benchmark,
        copies(inputs, cache == "cold"),
        lambda pair: (
            ours(out, pair) if impl == "cpu" else plain.ties_update(out, pair.base, pair.tuned, values, LAMBDA)
        ),
        nbytes=inputs.nbytes + 2 * out.nbytes,
        rounds=20,
    )
