"""topk_mask: the boolean mask of the k largest |x|, against plain torch with `topk` and a scatter and with `kthvalue`.

Counted bytes: x read once, the mask written once; the selection needs further passes.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import lors_kernels
from lors_kernels.testing import plain
from lors_kernels.testing.cases import SHAPES

from .inputs import DENSITY, DTYPES, Inputs, copies, make_inputs, time_call


def kthvalue(x: Tensor, k: int) -> Tensor:
    """All entries as large as the k-th: more than k where magnitudes are equal."""
    magnitudes = x.abs()
    return magnitudes >= magnitudes.flatten().kthvalue(x.numel() - k + 1).values


@pytest.mark.parametrize("impl", ["cpu", "torch", "torch kthvalue"])
@pytest.mark.parametrize("cache", ["cold"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_topk_mask(benchmark: Any, shape: str, dtype: str, cache: str, impl: str) -> None:
    m, n = SHAPES[shape]
    delta = make_inputs((m, n), "float32").delta
    inputs = Inputs(delta.to(DTYPES[dtype]), [])  # `base` is what is searched
    k = int(m * n * DENSITY)

    def ours(x: Tensor) -> Any:
        return lors_kernels.topk_mask(x, k, backend="cpu")

    found = ours(inputs.base)
    values = inputs.base.float().abs()
    assert int(found.sum()) == k, f"topk_mask: expected {k} entries, got {int(found.sum())}"
    assert values[found].min() >= values[~found].max(), "topk_mask: an entry that is left out is larger than a kept one"
    call = {"cpu": ours, "torch": lambda x: plain.topk_mask(x, k), "torch kthvalue": lambda x: kthvalue(x, k)}[impl]
    time_call(
        benchmark,
        copies(inputs, cache == "cold"),
        lambda pair: call(pair.base),
        nbytes=inputs.nbytes + m * n,
        rounds=20,
    )
