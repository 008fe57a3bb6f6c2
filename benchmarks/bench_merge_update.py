"""merge_update over 5 experts: out += sum_t weight * (L_t + keep(delta_t - L_t)), against plain torch.

Counted bytes: base, every expert and out read once, out written once, and the factors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lors_kernels

from .ops import DENSITY, DTYPES, EXPERTS, LAMBDA, SHAPES, Inputs, close, copies, factors, make_inputs, time_call


def plain(out: Tensor, inputs: Inputs, left: list[Tensor], right: list[Tensor], values: list[float]) -> Tensor:
    for tuned, u, v, value in zip(inputs.tuned, left, right, values, strict=True):
        low = u @ v.T
        residual = tuned.to(out.dtype) - inputs.base.to(out.dtype) - low
        out += LAMBDA * (low + torch.where(residual.abs() >= value, residual, 0))
    return out


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("cache", ["cold"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_merge_update(benchmark: Any, shape: str, dtype: str, cache: str, impl: str) -> None:
    m, n = SHAPES[shape]
    inputs = make_inputs((m, n), dtype, EXPERTS)
    singles = [Inputs(inputs.base, [tuned]) for tuned in inputs.tuned]
    left, right = (list(side) for side in zip(*(factors(single) for single in singles), strict=True))
    thresholds = [
        lors_kernels.residual_threshold(inputs.base, tuned, u, v, int(m * n * DENSITY), backend="cpu")
        for tuned, u, v in zip(inputs.tuned, left, right, strict=True)
    ]
    values = [threshold.value for threshold in thresholds]
    out = inputs.base.float()

    def ours(pair: Inputs) -> Any:
        return lors_kernels.merge_update(
            out, pair.base, pair.tuned, left, right, thresholds, [LAMBDA] * EXPERTS, backend="cpu"
        )

    zero = torch.zeros(m, n)
    lors_kernels.merge_update(
        zero, inputs.base, inputs.tuned, left, right, thresholds, [LAMBDA] * EXPERTS, backend="cpu"
    )
    naive = plain(torch.zeros(m, n), inputs, left, right, values)
    # An entry within a rounding of the threshold may be kept by one and dropped by the other: a few of m * n * EXPERTS.
    apart = (zero - naive).abs() > 0.5 * LAMBDA * min(values)
    assert int(apart.sum()) <= 1e-4 * m * n * EXPERTS, f"merge_update: {int(apart.sum())} entries differ"
    close(zero[~apart], naive[~apart].double(), naive[~apart] * (1 + 1e-6), "merge_update")
    time_call(
        benchmark,
        copies(inputs, cache == "cold"),
        ours if impl == "cpu" else lambda pair: plain(out, pair, left, right, values),
        nbytes=inputs.nbytes + 2 * out.nbytes + sum(each.nbytes for each in (*left, *right)),
        rounds=20,
    )
