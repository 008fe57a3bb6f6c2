"""Task Singular Vectors: every expert's strongest directions, made orthogonal to the others' (arXiv 2412.00081).

    delta_t ~ U_t S_t V_t^T, the int(min(m, n) / T) largest triplets of each of T experts
    W = W0 + lambda * polar([U_1 .. U_T]) diag(w_1 S_1 .. w_T S_T) polar([V_1 .. V_T])^T

polar(X) = X (X^T X)^(-1/2) is the nearest matrix with orthonormal columns. Experts of weight 0 are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import LorsError
from ..experts.factors import nonzero, svd64
from ..recipes.parameters import MethodSpec
from .base import LAMBDA, WEIGHT, Method
from .operands import Combination, Operands

# The eigenvectors of X^T X are good to 2^-53 over the share of its least eigenvalue: from here on to 1e-7.
GRAM_LIMIT = 1e-9


def combine(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Combination:
    chosen = [t for t, model in enumerate(models) if model["weight"]]

    def merge(operands: Operands) -> Iterator[tuple[int, np.ndarray]]:
        base = operands.base()
        out = operands.out(base)
        rank = int(min(operands.spec.shape) * (1 / len(chosen))) if chosen else 0
        if chosen and not rank:
            raise LorsError(
                f"tensor {operands.name!r}: expected at most {min(operands.spec.shape)} experts for a matrix "
                f"{list(operands.spec.shape)} with tsv, got {len(chosen)}"
            )
        left, right, sigma = [], [], []
        for t in chosen:
            u, s, v = operands.svd(t, rank)
            left.append(u)
            right.append(v)
            sigma.append(models[t]["weight"] * s)
        if chosen:
            u, v = (polar(np.concatenate(vectors, axis=1)) for vectors in (left, right))
            out += (shared["lambda"] * (u * np.concatenate(sigma)) @ v.T).astype(np.float32).ravel()
        yield 0, out

    return merge


def polar(x: np.ndarray) -> np.ndarray:
    """X (X^T X)^(-1/2) for float64 X [m, n]; directions of singular value 0 are left out.

    By eigenvectors of the smaller Gram matrix where it is well conditioned, which is faster, else by SVD.
    """
    if x.shape[0] < x.shape[1]:
        return polar(x.T).T
    if not x.size:
        return x
    values, vectors = np.linalg.eigh(x.T @ x)
    if values[0] > GRAM_LIMIT * values[-1]:
        half = vectors * values**-0.25
        return x @ (half @ half.T)  # type: ignore[no-any-return]
    u, sigma, v = svd64(x)
    there = nonzero(sigma, x.shape)
    return u[:, there] @ v[:, there].T  # type: ignore[no-any-return]


# lambda wants to be about 1, which is T times too much for tensors that are not decomposed
METHOD = Method(MethodSpec("tsv", (WEIGHT, LAMBDA), rest="average"), combine=combine)
