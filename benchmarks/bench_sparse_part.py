"""sparse_part: the kept entries of delta - L as a bit mask and values, against plain torch and numpy's packbits.

Counted bytes: base, tuned and the factors read once, mask and values written once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import lors_kernels
from lors_kernels.sparse_part import sparse_part
from lors_kernels.testing import plain
from lors_kernels.testing.cases import SHAPES

from .inputs import DENSITY, Inputs, copies, factors, make_inputs, time_call


@lru_cache(maxsize=1)
def prepare(m: int, n: int) -> tuple[Inputs, Tensor, Tensor, lors_kernels.Threshold]:
    inputs = make_inputs((m, n), "float32")
    left, right = factors(inputs)
    k = int(m * n * DENSITY)
    found = lors_kernels.residual_threshold(inputs.base, inputs.tuned[0], left, right, k, backend="cpu")
    return inputs, left, right, found


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("cache", ["cold"])
@pytest.mark.parametrize("dtype", ["float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_part(benchmark: Any, shape: str, dtype: str, cache: str, impl: str) -> None:
    m, n = SHAPES[shape]
    inputs, left, right, threshold = prepare(m, n)
    k = int(m * n * DENSITY)

    def ours(pair: Inputs) -> Any:
        arrays = (pair.base.numpy(), pair.tuned[0].numpy(), left.numpy(), right.numpy())
        return sparse_part(*arrays, threshold, k, backend="cpu")

    found, expected = ours(inputs), plain.sparse_part(inputs.base, inputs.tuned[0], left, right, threshold.value)
    # delta - L in another order of the rank's sum: entries within a rounding of the threshold may fall either way.
    flipped = int(np.unpackbits(found.mask ^ expected[0]).sum())
    assert flipped <= 1e-4 * m * n, f"sparse_part: {flipped} entries differ"
    time_call(
        benchmark,
        copies(inputs, cache == "cold"),
        ours
        if impl == "cpu"
        else lambda pair: plain.sparse_part(pair.base, pair.tuned[0], left, right, threshold.value),
        nbytes=inputs.nbytes + left.nbytes + right.nbytes + found.mask.nbytes + found.values.nbytes,
        rounds=20,
    )
