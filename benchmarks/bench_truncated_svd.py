"""truncated_svd at rank 7, certified to 1e-5, against LAPACK, svd_lowrank and scipy's ARPACK and PROPACK (error beside time).

These two get the loosest tolerance whose L is right to 1.2e-5, in float32 where that is enough. All may use every core.
"flat" is noise: no gap at the cut. Counted bytes: base and tuned once per pass; a pass after the first finds them in the
cache where the matrix fits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lors_kernels
from lors_kernels.testing.cases import SHAPES

from .inputs import DTYPES, RANK, Inputs, copies, make_inputs, time_call
from .released import Decompose, full_svd, lowrank_svd, thin_svd

# of the rivals that can be asked for one; ours claims 1e-5
ACCURACY = 1.2e-5
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def gesdd(delta: Tensor, rank: int) -> Tensor:
    linalg = pytest.importorskip("scipy.linalg")
    left, sigma, right = linalg.svd(delta.numpy(), full_matrices=False, lapack_driver="gesdd", check_finite=False)
    return torch.from_numpy((left[:, :rank] * sigma[:rank]) @ right[:rank])


def svds(solver: str, dtype: torch.dtype, tol: float) -> Decompose:
    """The wanted triplets by ARPACK or PROPACK."""
    sparse = pytest.importorskip("scipy.sparse.linalg")

    def decompose(delta: Tensor, rank: int) -> Tensor:
        left, sigma, right = sparse.svds(
            delta.to(dtype).numpy(), k=rank, tol=tol, solver=solver, maxiter=min(delta.shape), rng=0
        )
        return torch.from_numpy((left * sigma) @ right)

    return decompose


@lru_cache(maxsize=2)
def as_right(solver: str, inputs: Inputs) -> tuple[Decompose, str]:
    """The cheapest setting of a solver that is right to ACCURACY, and its name."""
    for dtype in (torch.float32, torch.float64):
        for tol in TOLERANCES:
            decompose = svds(solver, dtype, tol)
            try:
                error = error_of(decompose(inputs.delta, RANK), inputs)
            except (ArithmeticError, RuntimeError, np.linalg.LinAlgError):  # how the two say that they did not converge
                continue
            if error <= ACCURACY:
                return decompose, f"{str(dtype).removeprefix('torch.')}, tol {tol:g}"
    pytest.skip(f"{solver} is not right to {ACCURACY:g} at any tolerance down to {TOLERANCES[-1]:g}")


RIVALS: dict[str, Decompose | str] = {
    "torch full SVD": full_svd,
    "torch thin SVD": thin_svd,
    "torch svd_lowrank": lowrank_svd(RANK + 8, 2),
    "scipy gesdd": gesdd,
    "scipy ARPACK": "arpack",
    "scipy PROPACK": "propack",
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

    found_by = RIVALS.get(impl)
    decompose, setting = as_right(found_by, inputs) if isinstance(found_by, str) else (found_by, None)

    def rival(pair: Inputs) -> Tensor:
        assert decompose is not None
        return decompose(pair.delta, RANK)

    passes, facts = 1, {"setting": setting} if setting else {}
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
        **facts,
    )
