"""residual_threshold: the exact k-th largest |delta - L|, against plain torch with `kthvalue` and with `topk`.

Counted bytes: base, tuned and the factors once; a selection needs further passes, which stay in the cache where the
matrix fits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lors_kernels
from lors_kernels.testing import plain
from lors_kernels.testing.cases import SHAPES

from .inputs import DENSITY, DTYPES, Inputs, copies, factors, make_inputs, time_call


@pytest.mark.parametrize("impl", ["cpu", "torch", "torch topk"])
@pytest.mark.parametrize("cache", ["cold", "warm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_threshold(benchmark: Any, shape: str, dtype: str, cache: str, impl: str) -> None:
    m, n = SHAPES[shape]
    inputs = make_inputs((m, n), dtype)
    left, right = factors(inputs)
    k = int(m * n * DENSITY)

    def ours(pair: Inputs) -> Any:
        return lors_kernels.residual_threshold(pair.base, pair.tuned[0], left, right, k, backend="cpu")

    def kthvalue(pair: Inputs) -> Tensor:
        return plain.kth_largest(plain.residual_magnitudes(pair.base, pair.tuned[0], left, right), k)

    def topk(pair: Inputs) -> Tensor:
        return torch.topk(plain.residual_magnitudes(pair.base, pair.tuned[0], left, right), k).values[-1]

    # delta - L in another order of the rank's sum: one rounding of L apart, no more.
    expected, found = float(kthvalue(inputs)), ours(inputs).value
    assert abs(found - expected) <= 1e-6 * float((left @ right.T).abs().max()), (found, expected)
    time_call(
        benchmark,
        copies(inputs, cache == "cold"),
        {"cpu": ours, "torch": kthvalue, "torch topk": topk}[impl],
        nbytes=inputs.nbytes + left.nbytes + right.nbytes,
        rounds=20,
    )
