"""apply_update: out = base + update rounded once to the checkpoint's dtype, against the same line of plain torch.

Counted bytes: base and the float32 update read once, out written once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lors_kernels
from lors_kernels.testing import plain
from lors_kernels.testing.cases import SHAPES

from .inputs import DTYPES, Inputs, copies, make_inputs, time_call


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("cache", ["cold"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_apply_update(benchmark: Any, shape: str, dtype: str, cache: str, impl: str) -> None:
    inputs = make_inputs(SHAPES[shape], dtype)
    update, out = inputs.delta, torch.empty_like(inputs.base)

    def ours(pair: Inputs) -> Any:
        return lors_kernels.apply_update(out, pair.base, update, backend="cpu")

    ours(inputs)
    expected = plain.apply_update(torch.empty_like(out), inputs.base, update)
    assert torch.equal(out, expected), f"apply_update: {int((out != expected).sum())} entries are rounded otherwise"
    time_call(
        benchmark,
        copies(inputs, cache == "cold"),
        ours if impl == "cpu" else lambda pair: plain.apply_update(out, pair.base, update),
        nbytes=inputs.base.nbytes + update.nbytes + out.nbytes,
        rounds=50,
    )
