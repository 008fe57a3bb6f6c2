"""Singular triplets and polar factors, each direction exact, against matrices whose factors are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lors_kernels.dense import boost, boosted, leading, polar, polar_and_values, ridge_quotient

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


@pytest.mark.parametrize(
    ("sigma", "share", "want"),
    [
        ([4.0, 3.0, 2.0, 1.0], 0.0, [4.0, 4.0, 4.0, 4.0]),
        ([4.0, 3.0, 2.0, 1.0], 0.4, [4.0, 4.0, 4.0, 4.0]),
        ([4.0, 3.0, 2.0, 1.0], 0.41, [4.0, 3.0, 3.0, 3.0]),
        ([4.0, 3.0, 2.0, 1.0], 0.9, [4.0, 3.0, 2.0, 2.0]),
        ([4.0, 3.0, 2.0, 1.0], 1.0, [4.0, 3.0, 2.0, 1.0]),
        ([0.1] * 10, 1.0, [0.1] * 10),
        ([0.0, 0.0], 0.5, [0.0, 0.0]),
        ([], 0.5, []),
    ],
)
def test_boosted_singular_values(sigma: list[float], share: float, want: list[float]) -> None:
    found = boosted(torch.tensor(sigma, dtype=torch.float64), share)
    assert found.tolist() == pytest.approx(want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("there", [0, 1, 17, 40])
def test_boosting_raises_what_is_there_and_nothing_else(shape: tuple[int, int], there: int) -> None:
    left, right = (x[:, :there] for x in factors(shape))
    sigma = torch.from_numpy(np.geomspace(1, 1e-3, 40)[:there])
    x = ((left * sigma) @ right.T).float().double()  # what rounding adds is no direction
    want = (left * boosted(sigma, 0.5)) @ right.T
    assert gap(boost(x, 0.5), want) < 1e-4 and (there < 17 or gap(x, want) > 1e-3)
    assert torch.linalg.matrix_rank(boost(x, 0.5), tol=1e-5) == there


@pytest.mark.parametrize("ridge", [1e-6, 0.3, 10.0])
def test_a_quotient_with_a_ridge(ridge: float) -> None:
    rng = np.random.default_rng(0)
    half, product, goal = rng.standard_normal((30, 12)), rng.standard_normal((7, 12)), rng.standard_normal((7, 12))
    gram = half.T @ half
    eps = ridge * np.trace(gram) / 12
    want = (product + eps * goal) @ np.linalg.inv(gram + eps * np.eye(12))
    found = ridge_quotient(*map(torch.from_numpy, (product, gram, goal)), ridge)
    assert gap(found, torch.from_numpy(want)) < 1e-10
    with pytest.raises(torch.linalg.LinAlgError):
        ridge_quotient(
            torch.from_numpy(product), torch.diag(torch.tensor([-1.0] * 5 + [1.0] * 7)), torch.from_numpy(goal), 0.1
        )


@pytest.mark.parametrize("n", [191, 192, 193, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_quotient_of_many_columns_by_the_lower_triangle_alone(n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    x, product, goal = (torch.randn(40, n, generator=generator, dtype=torch.float64) for _ in range(3))
    gram = x.T @ x / x.square().sum()
    total = gram + 0.3 / n * torch.eye(n, dtype=torch.float64)
    want = torch.linalg.solve(total, product + 0.3 / n * goal, left=False)
    known = torch.where(torch.ones_like(gram, dtype=torch.bool).tril(), gram, torch.nan)
    found = ridge_quotient(product.to(dtype), known.to(dtype), goal.to(dtype), 0.3)
    assert gap(found.double(), want) <= (2e-5 if dtype == torch.float32 else 1e-12) * float(want.abs().max())
    known[n - 1, n - 1] = -1.0
    with pytest.raises(torch.linalg.LinAlgError):
        ridge_quotient(product.to(dtype), known.to(dtype), goal.to(dtype), 0.3)


# --- in float32, where a tolerance allows it --------------------------------------------------------------------------

LARGE = [(340, 300), (300, 340)]


def noise(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float().double()


def turned(vectors: Tensor, truth: Tensor) -> float:
    """Root mean square of the angles out of the span of `truth`."""
    return float((vectors - truth @ (truth.T @ vectors)).norm()) / vectors.shape[1] ** 0.5


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_leading_triplets_in_float32_keep_to_the_tolerance(shape: tuple[int, int], scale: float) -> None:
    x = scale * noise(shape)
    exact, found, strict = leading(x, 60), leading(x, 60, 2e-5), leading(x, 60, 1e-9)
    for side in (0, 2):
        assert 1e-9 < turned(found[side], exact[side]) <= 2e-5, "float32 has been used"
        assert torch.equal(strict[side], exact[side]), "which does not prove 1e-9"
    assert (found[1] / exact[1] - 1).abs().max() < 1e-6


def test_what_float32_cannot_prove_is_left_to_float64() -> None:
    sigma = torch.from_numpy(np.geomspace(1, 1e-7, 300))
    left, right = (torch.linalg.qr(noise((size, 300), size))[0] for size in (340, 301))
    x = (left * sigma) @ right.T
    for rank in (60, 200):
        assert all(map(torch.equal, leading(x, rank), leading(x, rank, 2e-5)))
    assert torch.equal(polar(x), polar_and_values(x, 5e-6)[0])


@pytest.mark.parametrize("wide", [False, True])
def test_polar_factors_in_float32_keep_to_the_tolerance(wide: bool) -> None:
    """Of what tsv has: as many orthonormal columns of several experts as make a square."""
    x = torch.cat([torch.linalg.qr(noise((300, 60), t))[0] for t in range(5)], dim=1)
    x = x.T if wide else x
    exact, values = polar_and_values(x)
    found, also = polar_and_values(x, 5e-6)
    error = float((found - exact).norm()) / 300**0.5
    assert 1e-9 < error <= 5e-6
    assert (also.sort()[0] - values.sort()[0]).abs().max() < 1e-6 and values.min() < 0.05


@pytest.mark.parametrize("what", ["twice", "zero", "almost twice"])
def test_polar_factors_of_too_few_directions_are_exact(what: str) -> None:
    one = torch.linalg.qr(noise((320, 150)))[0]
    other = {"twice": one, "zero": 0 * one, "almost twice": one + 1e-7 * noise((320, 150), 1)}[what]
    x = torch.cat([one, other], dim=1)
    assert torch.equal(polar(x), polar_and_values(x, 5e-6)[0])
