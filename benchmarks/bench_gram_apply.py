"""gram_apply: z = delta.T @ (delta @ x), one pass over base and tuned, against two matrix products of plain torch.

Counted bytes: base and tuned once, x read, z written. A pass is 4 m n b floating-point operations and forming delta.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lors_kernels
from lors_kernels.testing import plain
from lors_kernels.testing.cases import SHAPES

from .inputs import DTYPES, Inputs, close, copies, make_inputs, time_call

BLOCK = 16


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("cache", ["cold", "warm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_apply(benchmark: Any, shape: str, dtype: str, cache: str, impl: str) -> None:
    m, n = SHAPES[shape]
    inputs = make_inputs((m, n), dtype)
    x = torch.randn(n, BLOCK, generator=torch.Generator().manual_seed(1))
    delta = inputs.delta.double()
    truth = delta.T @ (delta @ x.double())
    close(
        lors_kernels.gram_apply(inputs.base, inputs.tuned[0], x, backend="cpu"),
        truth,
        plain.gram_apply(inputs.base, inputs.tuned[0], x),
        "gram_apply",
    )

    def ours(pair: Inputs) -> Tensor:
        z: Tensor = lors_kernels.gram_apply(pair.base, pair.tuned[0], x, backend="cpu")
        return z

    time_call(
        benchmark,
        copies(inputs, cache == "cold"),
        ours if impl == "cpu" else lambda pair: plain.gram_apply(pair.base, pair.tuned[0], x),
        nbytes=inputs.nbytes + 2 * x.nbytes,
        rounds=50,
        flops=4 * m * n * BLOCK,
    )
