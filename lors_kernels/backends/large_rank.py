"""Truncated SVDs at large ranks, with a certificate: eigenvectors of A.T A in float32, put right in float64 at the cut.

A dense solver in float64 spends its time on accuracy that few pairs need. What L may be off by is how far the wanted vectors
are turned towards those beyond the cut, each by the rounding of float32 over the distance of their values. So the pairs near
the cut, wanted ones and as many beyond it, are held apart by a Rayleigh-Ritz step in float64; for the others float32 does.
Residuals are measured, and docs/certificate.md says what follows from them. Where they do not prove the contract, None is
returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..certificate import EQUAL, ERROR_BOUND, error_bound
from ..precision import full_precision

if TYPE_CHECKING:
    from torch import Tensor

    # symmetric float32 [n, n], count -> (all values [n] float64, the first `count` vectors [n, count] float32), largest first
    Eigh = Callable[[Tensor, int], tuple[Tensor, Tensor]]

NEAR = 48  # pairs on either side of the cut that are held apart, at least; else a quarter of the rank
VALUES = 4e-6  # how far an eigenvalue in float32 may lie from that of A.T A, relative to the largest: 60 roundings


class Found(NamedTuple):
    product: Tensor  # [m, r] float64: A V
    vectors: Tensor  # [n, r] float64: V
    theta: Tensor  # [r] float64: squares of the singular values, largest first
    residual: float  # bound on ||A V V.T - L|| / ||L||


def decompose(a: Tensor, rank: int, eigh: Eigh) -> Found | None:
    """The `rank` largest singular triplets of A [m, n] float32 or float64, m >= n, entries of at most 1 in magnitude; None where
    what was measured proves less than ERROR_BOUND, or the values at the cut are as good as equal."""

    reach = max(NEAR, rank // 4)
    count = rank + reach
    if count >= a.shape[1]:
        return None
    with full_precision():
        single_a = a.float()
        values, single = eigh(single_a.T @ single_a, count)
        upper = values[count] + VALUES * values[0]  # of all other eigenvalues
        vectors = single.double()
        product = a.double() @ vectors
        theta = product.square().sum(0) / vectors.square().sum(0)
        near = slice(max(0, rank - reach), count)
        turn, theta[near] = held_apart(vectors[:, near], product[:, near])
        vectors[:, near] = vectors[:, near] @ turn
        product[:, near] = product[:, near] @ turn
        if not theta[rank - 1] - theta[rank] > 2 * EQUAL * theta[rank - 1]:
            return None
        lent = _take_back(vectors, product, theta, rank)
        bound = _bound(single_a, vectors, product, theta, rank, upper) + lent / 5
    if not bound <= ERROR_BOUND:
        return None
    order = theta[:rank].argsort(descending=True, stable=True)
    return Found(product[:, order], vectors[:, order], theta[order], bound)


def held_apart(vectors: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """(c [w, w], theta [w] largest first) with V c orthonormal and (A V c).T (A V c) = diag(theta): a Rayleigh-Ritz step. NaN
    where V has not got w directions."""
    import torch

    inner = torch.cat([vectors.T @ vectors, product.T @ product])
    factor, failed = torch.linalg.cholesky_ex(inner[: len(inner.T)])
    if failed or not inner.isfinite().all():
        return torch.full_like(factor, math.nan), torch.full_like(factor[0], math.nan)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False)
    theta, turn = torch.linalg.eigh(inverse @ inner[len(factor) :] @ inverse.T)
    return inverse.T @ turn.flip(1), theta.flip(0)


def _take_back(vectors: Tensor, product: Tensor, theta: Tensor, rank: int) -> float:
    """One step of perturbation: takes from the wanted vectors what those beyond the cut have lent them. Returns how much of L it
    was; what it leaves is of second order."""
    wanted, extra = slice(rank), slice(rank, None)
    mixed = product[:, extra].T @ product[:, wanted]
    mixed -= (vectors[:, extra].T @ vectors[:, wanted]) * theta[wanted]
    turn = mixed / (theta[wanted] - theta[extra, None])
    vectors[:, wanted] += vectors[:, extra] @ turn
    product[:, wanted] += product[:, extra] @ turn
    lent = ((theta[wanted] + theta[rank]) * turn.square().sum(0)).sum() / theta[wanted].sum()
    return float(lent.sqrt())


def _bound(a: Tensor, vectors: Tensor, product: Tensor, theta: Tensor, rank: int, upper: Tensor) -> float:
    """On ||A V V.T - L|| / ||L||, V the first `rank` of the vectors: by what lies beyond all of them, and by how far they are
    from orthonormal."""
    import torch

    wanted = slice(rank)
    skew = vectors[:, wanted].T @ vectors[:, wanted]
    skew.diagonal().sub_(1)
    turned = (theta[wanted] * skew.square_().sum(0)).sum() / theta[wanted].sum()
    single = vectors.float()
    residual = a.T @ product.float() - single * theta.float()
    held = (theta > upper).sum()[None]

    def bound() -> float:
        rho = torch.linalg.vector_norm(residual, dim=0).double()
        beyond = error_bound(theta[None], rho[None], rank, held, upper[None])[0]
        return float(1.25 * beyond + turned.sqrt())

    first = bound()
    if first <= ERROR_BOUND:
        return first
    residual -= single @ (single.T @ residual)  # what the pairs have of each other turns none of them out
    return bound()
