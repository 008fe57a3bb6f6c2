"""Singular triplets and polar factors, each direction exact, against matrices whose factors are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lors_kernels.dense import leading, polar

SHAPES = [(60, 40), (40, 60)]


def factors(shape: tuple[int, int], seed: int = 3) -> tuple[Tensor, Tensor]:
    """Orthonormal [m, 40] and [n, 40]."""
    rng = np.random.default_rng(seed)
    return tuple(torch.from_numpy(np.linalg.qr(rng.standard_normal((size, 40)))[0]) for size in shape)  # type: ignore[return-value]


def gap(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("least", [1.0, 1e-2, 1e-5, 1e-9])
def test_polar_factors_of_badly_conditioned_matrices(shape: tuple[int, int], least: float) -> None:
    left, right = factors(shape)
    sigma = torch.from_numpy(np.geomspace(1, least, 40))
    assert gap(polar((left * sigma) @ right.T), left @ right.T) < max(1e-8, 1e-15 / least)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("there", [0, 1, 17])
def test_polar_factors_leave_out_what_is_not_there(shape: tuple[int, int], there: int) -> None:
    left, right = (x[:, :there] for x in factors(shape))
    sigma = torch.from_numpy(np.geomspace(1, 1e-4, 40)[:there])
    assert gap(polar((left * sigma) @ right.T), left @ right.T) < 1e-8


def test_the_polar_factor_of_nothing() -> None:
    assert polar(torch.zeros(5, 0, dtype=torch.float64)).shape == (5, 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("sigma", "rank"),
    [
        (np.geomspace(1, 1e-7, 40), 30),
        (np.array([1.0, *[1e-4] * 10, *[1e-4 * (1 - 1e-5)] * 29]), 11),
        (np.arange(1, 41) ** -0.5, 8),
        (np.arange(1, 41) ** -0.5, 40),
        (np.array([3.0, 2.0, 1.0] + [0.0] * 37), 8),
        (np.zeros(40), 3),
    ],
    ids=["graded", "small gap", "power law", "all", "low rank", "zero"],
)
def test_leading_triplets_are_exact(shape: tuple[int, int], sigma: np.ndarray, rank: int) -> None:
    left, right = factors(shape)
    u, found, v = leading((left * torch.from_numpy(sigma)) @ right.T, rank)
    kept = min(rank, int((sigma > 0).sum()))
    assert u.shape[1] == v.shape[1] == len(found) == kept
    if not kept:
        return
    assert np.abs(found.numpy() / sigma[:kept] - 1).max() < 1e-7
    for vectors, truth in ((u, left), (v, right)):  # those of equal values may be turned among themselves
        assert gap(vectors.T @ vectors, torch.eye(kept, dtype=torch.float64)) < 1e-7
        assert gap(vectors @ vectors.T, truth[:, :kept] @ truth[:, :kept].T) < 1e-7
