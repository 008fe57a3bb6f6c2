"""merge_update over 5 experts: out += sum_t weight * (L_t + keep(delta_t - L_t)), against plain torch.

Counted bytes: base, every expert and out read once, out written once, and the factors.
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

from .inputs import DENSITY, DTYPES, EXPERTS, LAMBDA, Inputs, close, copies, factors, make_inputs, time_call


@lru_cache(maxsize=1)
def prepare(m: int, n: int, dtype: str) -> tuple[Inputs, list[Tensor], list[Tensor], list[lors_kernels.Threshold]]:
    inputs = make_inputs((m, n), dtype, EXPERTS)
    singles = [Inputs(inputs.base, [tuned]) for tuned in inputs.tuned]
    left, right = (list(side) for side in zip(*(factors(single) for single in singles), strict=True))
    thresholds = [
        lors_kernels.residual_threshold(inputs.base, tuned, u, v, int(m * n * DENSITY), backend="cpu")
        for tuned, u, v in zip(inputs.tuned, left, right, strict=True)
    ]
    return inputs, left, right, thresholds


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("cache", ["cold"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_merge_update(benchmark: Any, shape: str, dtype: str, cache: str, impl: str) -> None:
    m, n = SHAPES[shape]
    inputs, left, right, thresholds = prepare(m, n, dtype)
    values = [threshold.value for threshold in thresholds]
    weights = [LAMBDA] * EXPERTS

    def ours(out: Tensor, pair: Inputs) -> Any:
        return lors_kernels.merge_update(out, pair.base, pair.tuned, left, right, thresholds, weights, backend="cpu")

    found = torch.zeros(m, n)
    ours(found, inputs)
    truth, naive = (
        plain.merge_update(torch.zeros(m, n, dtype=d), inputs.base, inputs.tuned, left, right, values, LAMBDA)
        for d in (torch.float64, torch.float32)
    )
    # An entry within a rounding of the threshold may be kept by one and dropped by another: a few of m * n * EXPERTS.
    flipped = (found - truth).abs().maximum((naive - truth).abs()) > 0.5 * LAMBDA * min(values)
    assert int(flipped.sum()) <= 1e-4 * m * n * EXPERTS, f"merge_update: {int(flipped.sum())} entries differ"
    close(found[~flipped], truth[~flipped], naive[~flipped], "merge_update")
    out = inputs.base.float()
    time_call(
        benchmark,
        copies(inputs, cache == "cold"),
        lambda pair: (
            ours(out, pair)
            if impl == "cpu"
            else plain.merge_update(out, pair.base, pair.tuned, left, right, values, LAMBDA)
        ),
        nbytes=inputs.nbytes + 2 * out.nbytes + sum(each.nbytes for each in (*left, *right)),
        rounds=20,
    )
