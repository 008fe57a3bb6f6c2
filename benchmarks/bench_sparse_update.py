"""sparse_update: out += weight * (L + S) from a bit mask and values, against numpy's unpackbits and plain torch.

Counted bytes: out read and written once, mask, values and factors read once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lors_kernels.sparse_part import SparsePart
from lors_kernels.sparse_update import sparse_update
from lors_kernels.testing import plain
from lors_kernels.testing.cases import SHAPES

from .inputs import DENSITY, DTYPES, LAMBDA, Inputs, close, copies, factors, make_inputs, time_call


def make_part(m: int, n: int, dtype: str) -> tuple[SparsePart, Tensor]:
    """Exactly int(m n density) entries at random places, and the same values in torch."""
    rng = np.random.default_rng(0)
    k = int(m * n * DENSITY)
    bits = np.zeros(m * n, np.uint8)
    bits[rng.permutation(m * n)[:k]] = 1
    values = torch.from_numpy(rng.standard_normal(k, dtype=np.float32) * 1e-3).to(DTYPES[dtype])
    return SparsePart(np.packbits(bits, bitorder="little"), numpy_of(values)), values


def numpy_of(values: Tensor) -> np.ndarray:
    if values.dtype != torch.bfloat16:
        return values.numpy()
    import ml_dtypes

    return values.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("cache", ["cold"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_update(benchmark: Any, shape: str, dtype: str, cache: str, impl: str) -> None:
    m, n = SHAPES[shape]
    inputs = make_inputs((m, n), "float32")
    left, right = factors(inputs)
    part, values = make_part(m, n, dtype)

    def ours(out: Tensor) -> Any:
        return sparse_update(out.numpy(), part, left.numpy(), right.numpy(), weight=LAMBDA, backend="cpu")

    found = torch.zeros(m, n)
    ours(found)
    truth, naive = (
        plain.sparse_update(torch.zeros(m, n, dtype=d), part.mask, values, left, right, LAMBDA)
        for d in (torch.float64, torch.float32)
    )
    close(found, truth, naive, "sparse_update")
    ring = copies(Inputs(inputs.base.clone(), []), cache == "cold")  # `base` is what is updated
    time_call(
        benchmark,
        ring,
        lambda pair: (
            ours(pair.base) if impl == "cpu" else plain.sparse_update(pair.base, part.mask, values, left, right, LAMBDA)
        ),
        nbytes=2 * inputs.base.nbytes + part.mask.nbytes + part.values.nbytes + left.nbytes + right.nbytes,
        rounds=20,
    )
