from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lors_kernels as kernels
from helpers import assert_no_worse, require, ringed
from lors_kernels import NonFiniteError
from lors_kernels.backends import cpu, large_rank
from lors_kernels.testing.cases import CASES, DTYPES, Case, by_name
from lors_kernels.testing.numerics import LOW_RANK_ERROR, delta_of, judge_claim, judge_low_rank
from lors_kernels.testing.spectra import KINDS, from_spectrum, hard_case, hard_cases, orthonormal
from lors_kernels.types import FactorOverflowError, dense_claim


def low_rank(svd: kernels.TruncatedSVD) -> np.ndarray:
    return svd.left.astype(np.float64) @ svd.right.astype(np.float64).T


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contract(case: Case) -> None:
    base, tuned = case.matrices()
    delta = delta_of(base, tuned)
    svd = kernels.truncated_svd(base, tuned, case.rank)
    verdict = judge_low_rank(delta, low_rank(svd), case.rank)
    assert verdict.ok, f"{svd.method} after {svd.passes} passes: {verdict}"
    assert svd.backend == "cpu"
    assert svd.energy == pytest.approx(
        float((delta.astype(np.float64) ** 2).sum()), rel=1e-5, abs=1e-80
    )  # as UpdateStats
    exact = np.linalg.svd(delta.astype(np.float64), compute_uv=False)[: case.rank]
    assert_no_worse(svd.sigma, torch.linalg.svdvals(torch.from_numpy(delta))[: case.rank], exact, factor=1)


@pytest.mark.parametrize("case", [case for case in CASES if not case.large], ids=lambda case: case.name)
def test_the_certificate_is_an_upper_bound(case: Case) -> None:
    """The error that is claimed is never below the error that is there."""
    base, tuned = case.matrices()
    svd = kernels.truncated_svd(base, tuned, case.rank)
    verdict = judge_claim(delta_of(base, tuned), svd.left, svd.right, svd.residual, svd.unique)
    assert verdict.ok, verdict


@given(
    m=st.integers(1, 90),
    n=st.integers(1, 90),
    data=st.data(),
    decay=st.floats(0.0, 3.0),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_rank_and_spectrum(m: int, n: int, data: st.DataObject, decay: float, dtype: str, seed: int) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    rng = np.random.default_rng(seed)
    k = min(m, n)
    u, v = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, n))
    delta = (u * np.arange(1, k + 1) ** -decay) @ v.T
    base = (rng.standard_normal((m, n)) * 0.05).astype(DTYPES[dtype])
    tuned = (base.astype(np.float64) + delta).astype(DTYPES[dtype])
    svd = kernels.truncated_svd(base, tuned, rank, seed=seed % 7)
    verdict = judge_low_rank(delta_of(base, tuned), low_rank(svd), rank)
    assert verdict.ok, f"{svd.method}: {verdict}"


@pytest.mark.parametrize("name", ["wide", "flat-noise"])  # measured as they are, and held apart
def test_same_bits_for_any_number_of_threads_and_on_every_run(name: str) -> None:
    base, tuned = by_name(name).matrices()
    results = set()
    for threads in (1, 2, 3, 1):
        svd = kernels.truncated_svd(base, tuned, 7, threads=threads)
        results.add(svd.left.tobytes() + svd.right.tobytes() + svd.sigma.tobytes())
    assert len(results) == 1


def test_the_seed_changes_the_start_and_not_the_result() -> None:
    base, tuned = next(case for case in CASES if case.name == "power-0.5").matrices()
    first, second = (kernels.truncated_svd(base, tuned, 7, seed=seed) for seed in (0, 1))
    assert first.left.tobytes() != second.left.tobytes()
    difference = np.linalg.norm(low_rank(first) - low_rank(second))
    assert difference <= LOW_RANK_ERROR * np.linalg.norm(low_rank(first))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_what_is_claimed_of_hard_spectra_holds(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 of the 20,000 of `python -m benchmarks certificate`, for every instruction set that runs here."""
    require(isa, isa in cpu.instruction_sets(), "not of this processor")
    monkeypatch.setattr(cpu, "library", lambda: cpu.load(isa))
    methods, unique = Counter[str](), Counter[bool]()
    for case in hard_cases(500, first=1_000_000):
        svd = kernels.truncated_svd(None, case.delta, case.rank, seed=case.seed, backend="cpu")
        verdict = judge_claim(case.delta, svd.left, svd.right, svd.residual, svd.unique)
        assert verdict.ok, f"{case.kind} {case.seed}, rank {case.rank} of {case.delta.shape}: {svd.method}: {verdict}"
        methods[svd.method] += 1
        unique[svd.unique] += 1
    assert min(methods["krylov"], methods["krylov64"], unique[True], unique[False]) > 30  # nothing is trivial
    assert methods["krylov"] > 350  # and no certificate is bought by solving everything densely


def test_copies_that_a_block_cannot_find_are_not_missed() -> None:
    """Eight equal blocks: a block of two vectors finds two of eight copies, and a residual does not see the others."""
    delta = np.kron(np.eye(8), np.random.default_rng(4).standard_normal((16, 16))).astype(np.float32)
    svd = kernels.truncated_svd(None, delta, 8, backend="cpu")
    verdict = judge_claim(delta, svd.left, svd.right, svd.residual, svd.unique)
    assert verdict.ok and svd.unique and verdict.error < 1e-5


@pytest.mark.parametrize("shape", [(116, 12), (102, 43), (300, 200)])
def test_a_cluster_far_below_the_first_values(shape: tuple[int, int]) -> None:
    """Ritz values of the cluster are off by what was rounded at the height of the first: no cut among them can be trusted."""
    m, n = shape
    for seed in range(20):
        rng = np.random.default_rng(seed)
        depth, width = 10 ** rng.uniform(-4, -2), 10 ** rng.uniform(-5.5, -5)
        sigma = np.concatenate([[2.0, 1.8, 1.2, 0.9], depth * (1 + width * rng.random(n - 4))])
        delta = from_spectrum(rng, m, n, np.sort(sigma)[::-1]).astype(np.float32)
        svd = kernels.truncated_svd(None, delta, 5, seed=seed, backend="cpu")
        verdict = judge_claim(delta, svd.left, svd.right, svd.residual, svd.unique)
        assert verdict.ok, f"seed {seed}, cluster at {depth:.0e}: {svd.method}: {verdict}"


def test_squares_too_small_to_tell_values_apart_are_not_called_equal() -> None:
    """sigma_4 and sigma_5 differ by 3e-6 and are 1e-5 of the first: their squares differ by less than float64 rounds."""
    rng = np.random.default_rng(5)
    sigma = np.concatenate([[2.0], 2e-5 * (1 - 3e-6 * np.arange(44))])
    delta = from_spectrum(rng, 160, 45, sigma).astype(np.float32)
    svd = kernels.truncated_svd(None, delta, 4, backend="cpu")
    verdict = judge_claim(delta, svd.left, svd.right, svd.residual, svd.unique)
    assert verdict.ok, f"{svd.method}: {verdict}"
    assert dense_claim([1.0, 1e-5, 1e-5 * (1 - 1e-8)], 2, 10, squared=True) == (math.inf, True)


@pytest.mark.parametrize("seed", range(8))
def test_the_value_beyond_the_cut_is_bounded_from_above(seed: int) -> None:
    """A Ritz value is a lower bound: taking it for theta_{r+1} would claim 50 times too little here."""
    rng = np.random.default_rng(seed)
    sigma = np.arange(1, 201) ** -0.3
    sigma[7:] *= sigma[6] * (1 - 1e-5) / sigma[7]
    delta = from_spectrum(rng, 320, 256, sigma).astype(np.float32)
    svd = kernels.truncated_svd(None, delta, 7, seed=seed, backend="cpu")
    verdict = judge_claim(delta, svd.left, svd.right, svd.residual, svd.unique)
    assert verdict.ok and svd.unique, verdict


def test_noise_at_the_cut_needs_no_iteration_in_float64() -> None:
    for case in (by_name("flat-noise"), by_name("tight-gap"), by_name("clustered")):
        assert kernels.truncated_svd(*case.matrices(), 7).method == "krylov", case.name


def test_noise_waits_for_no_more_than_the_proof() -> None:
    """Rounding keeps the wanted pairs alone from the bound here; one more, held apart, is enough for it."""
    delta = np.random.default_rng(0).standard_normal((512, 384)).astype(np.float32)
    svd = kernels.truncated_svd(None, delta, 7, backend="cpu")
    assert svd.method == "krylov" and svd.passes <= 53


def test_values_of_very_different_size_need_float64() -> None:
    delta = from_spectrum(np.random.default_rng(0), 300, 200, 10.0 ** -np.arange(0, 20, 0.7)).astype(np.float32)
    svd = kernels.truncated_svd(None, delta, 7, backend="cpu")
    assert svd.method == "krylov64" and judge_claim(delta, svd.left, svd.right, svd.residual, svd.unique).ok


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equal_values_across_the_cut_are_told(backend: str) -> None:
    delta = orthonormal(np.random.default_rng(1), 90, 60).astype(np.float32)
    svd = kernels.truncated_svd(None, delta, 7, backend=backend)
    assert not svd.unique and judge_claim(delta, svd.left, svd.right, svd.residual, svd.unique).ok
    delta[:, 7:] *= 0.9
    assert kernels.truncated_svd(None, delta, 7, backend=backend).unique


def test_values_that_differ_are_not_called_equal() -> None:
    """1.03e-6 apart, above the limit; the Ritz values of a space that has not quite converged are nearer to each other."""
    case = hard_case("flat-tail", 10_006_665, smallest=8)
    svd = kernels.truncated_svd(None, case.delta, case.rank, seed=case.seed, backend="cpu")
    assert svd.unique and judge_claim(case.delta, svd.left, svd.right, svd.residual, svd.unique).ok


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_factors_beyond_float32_are_an_error(backend: str) -> None:
    delta = np.full((64, 64), 2.0**127, np.float32)
    with pytest.raises(FactorOverflowError, match="overflows float32: 64 entries"):
        kernels.truncated_svd(None, delta, 1, backend=backend)


def test_strided_rows() -> None:
    rng = np.random.default_rng(0)
    tuned = rng.standard_normal((60, 45)).astype(np.float32)
    view, whole = ringed(tuned)
    before = whole.tobytes()
    assert kernels.truncated_svd(None, view, 3).left.tobytes() == kernels.truncated_svd(None, tuned, 3).left.tobytes()
    assert whole.tobytes() == before


def test_non_finite(backend: str) -> None:
    tuned = np.ones((30, 20), np.float32)
    tuned[3, 3] = np.nan
    with pytest.raises(NonFiniteError, match="got 1 NaN"):
        kernels.truncated_svd(None, tuned, 2, backend=backend)


@pytest.mark.parametrize("rank", [0, 5, -1, 1.0, True])
def test_wrong_rank(rank: object) -> None:
    with pytest.raises((TypeError, ValueError), match="rank: expected"):
        kernels.truncated_svd(None, np.ones((4, 6), np.float32), rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(400, 320), (320, 400)])
@pytest.mark.parametrize("scale", [1.0, 1e-42, 1e30])
def test_large_ranks_are_decomposed_densely(shape: tuple[int, int], scale: float) -> None:
    """There a Krylov space costs more than float32 eigenvectors and their certificate."""
    delta = (scale * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    found = kernels.truncated_svd(None, delta, 160, backend="cpu")
    assert (found.method, found.passes) == ("eigh32", 0)
    assert judge_claim(delta, found.left, found.right, found.residual, found.unique).ok
    assert found.residual <= (1e-5 if scale > 1e-30 else 0.1)  # denormal factors


@pytest.mark.parametrize("kind", KINDS)
def test_large_ranks_of_hard_matrices(kind: str) -> None:
    """The dense solvers alone, in float32 where that can be certified."""
    methods = set()
    for seed in range(4):
        rng = np.random.default_rng([seed, 7])
        m, n = (int(x) for x in rng.integers(70, 180, 2))
        rank = int(rng.integers(1, min(m, n) - 49))
        with np.errstate(over="ignore", under="ignore"):
            delta = np.ascontiguousarray(KINDS[kind](rng, m, n, rank), dtype=np.float32)
        rank = min(rank, *delta.shape)
        left, right, sigma = (np.empty(s, np.float32) for s in ((len(delta), rank), (delta.shape[1], rank), rank))
        method, residual, unique, overflows = cpu._dense(None, delta, left, right, sigma)
        methods.add(method)
        if not overflows:
            verdict = judge_claim(delta, left, right, residual, unique)
            assert verdict.ok, f"{kind} {seed}, rank {rank}: {method}: {verdict}"
            assert (np.diff(sigma) <= 1e-6 * sigma[:1]).all()
    assert methods <= {"eigh32", "eigh64", "svd64"}
    if kind in ("gaussian", "power_law_and_noise"):
        assert "eigh32" in methods


def test_an_eigenvector_that_is_missing_or_wrong_proves_nothing() -> None:
    """What float32 returns is measured: the contract does not rest on it."""
    a = torch.from_numpy(np.random.default_rng(1).standard_normal((200, 160)).astype(np.float32) / 6)

    def swapped(g: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = cpu.eigh_single(g, count)
        vectors[:, 3] = vectors[:, 4]
        return values, vectors

    def turned(g: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = cpu.eigh_single(g, count)
        return values, vectors + 1e-4 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))

    assert large_rank.decompose(a, 40, cpu.eigh_single) is not None
    assert large_rank.decompose(a, 40, swapped) is None and large_rank.decompose(a, 40, turned) is None


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 50, 131])
def test_eigenvectors_in_float32(n: int) -> None:
    x = torch.from_numpy(np.random.default_rng(n).standard_normal((n + 3, n)))
    for g in ((x.T @ x).float(), torch.zeros(n, n), torch.eye(n), torch.diag(torch.logspace(0, -30, n))):
        theta, vectors = cpu.eigh_single(g, n)
        largest = max(float(theta[0]), 1e-30)
        assert (theta.diff() <= 0).all()
        assert (theta - torch.linalg.eigvalsh(g.double()).flip(0)).abs().max() <= 2e-6 * largest
        v = vectors.double()
        assert (g.double() @ v - v * theta).norm(dim=0).max() <= 4e-6 * largest
        assert (v.T @ v - torch.eye(n, dtype=torch.float64)).abs().max() <= 2e-6
