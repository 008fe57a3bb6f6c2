"""The batched driver on every shared case. The products with delta come from the CPU; the driver is what a GPU runs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

import lors_kernels as kernels
from helpers import require_backend
from lors_kernels import NonFiniteError, reference
from lors_kernels.arrays import to_torch
from lors_kernels.backends import cpu
from lors_kernels.backends.loop import Loop
from lors_kernels.backends.truncated_svd import NOISE, decompose, krylov_limit, krylov_pays, orthonormalise
from lors_kernels.certificate import Spectrum, error_bound
from lors_kernels.group import GroupSVD, MatrixGroup
from lors_kernels.grouped import merge_update_group, residual_threshold_group, truncated_svd_group
from lors_kernels.testing.cases import CASES, Case, by_name, gaussian, with_spectrum
from lors_kernels.testing.numerics import LOW_RANK_ERROR, delta_of, judge_claim, judge_low_rank
from lors_kernels.testing.spectra import from_spectrum, hard_cases
from lors_kernels.types import FactorOverflowError


def group_of(*cases: Case, seed: int = 0) -> MatrixGroup:
    pairs = [[to_torch(x.copy()) for x in case.matrices(seed)] for case in cases]
    return MatrixGroup([base for base, _ in pairs], [[tuned] for _, tuned in pairs])


def judge(group: MatrixGroup, svd: GroupSVD, rank: int) -> None:
    for p, (base, tuned) in enumerate(group.each()):
        delta = reference.delta(base, tuned).numpy()
        left, right = svd.left[p].numpy(), svd.right[p].numpy()
        for verdict in (
            judge_low_rank(delta, left.astype(np.float64) @ right.astype(np.float64).T, rank),
            judge_claim(delta, left, right, svd.residual[p], svd.unique[p]),
        ):
            assert verdict.ok, f"pair {p}: {svd.method[p]} after {svd.passes[p]} passes: {verdict}"


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.large or case.name == "small-attn-power"], ids=lambda case: case.name
)
def test_contract(case: Case) -> None:
    require_backend("cpu")
    group = group_of(case)
    svd = truncated_svd_group(group, case.rank, backend="cpu")
    judge(group, svd, case.rank)
    delta = delta_of(*case.matrices()).astype(np.float64)
    assert svd.energy[0] == pytest.approx(float((delta**2).sum()), rel=1e-5, abs=1e-80)  # as UpdateStats
    assert (svd.sigma[0].diff() <= 1e-6 * svd.sigma[0, 0]).all()


@pytest.mark.parametrize("width", [8, 16])
def test_pairs_of_one_group_stop_each_on_its_own(width: int) -> None:
    """Spectra that need 4 and 20 passes, one that needs float64, ones that are flat or zero: all certified, none disturbed."""
    rng = np.random.default_rng(8)
    builds = [
        with_spectrum(224, 256, lambda i: i**-0.5), gaussian(224, 256), with_spectrum(224, 256, lambda i: 2.0**-i),
        with_spectrum(224, 256, lambda i: np.where(i <= 9, 1 - 1e-4 * i, 0.3 / i)), lambda _: np.zeros((224, 256)),
        with_spectrum(224, 256, np.ones_like), with_spectrum(224, 256, lambda i: 10.0 ** (-0.7 * i)),
    ]  # fmt: skip
    deltas = [torch.from_numpy(build(rng).astype(np.float32)) for build in builds]
    group = MatrixGroup(None, [[x] for x in deltas])
    ops = Loop(cpu)
    ops.width = width
    svd = decompose(ops, group, 7, 0)
    judge(group, svd, 7)
    assert svd.method[0] == svd.method[2] == svd.method[3] == "krylov" and svd.method[6] == "krylov64"
    assert svd.unique == [True, True, True, True, True, False, True]
    assert svd.passes[2] < svd.passes[1]
    assert not svd.left[4].any() and not svd.sigma[4].any()


def test_wide_and_transposed_agree() -> None:
    case = by_name("clustered")
    base, tuned = (to_torch(x.copy()) for x in case.matrices())
    upright = truncated_svd_group(MatrixGroup([base.T.contiguous()], [[tuned.T.contiguous()]]), 7, backend="reference")
    lying = truncated_svd_group(MatrixGroup([base], [[tuned]]), 7, backend="reference")
    one, other = upright.left[0] @ upright.right[0].T, (lying.left[0] @ lying.right[0].T).T
    assert (one - other).norm() <= 2 * LOW_RANK_ERROR * one.norm()  # each within the contract


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e15, 1e18])
def test_magnitudes_whose_squares_leave_float32(scale: float) -> None:
    x = torch.from_numpy(with_spectrum(192, 200, lambda i: i**-1.0, 1.0)(np.random.default_rng(3)) * scale).float()
    group = MatrixGroup(None, [[x]])
    judge(group, truncated_svd_group(group, 5, backend="cpu"), 5)


def test_same_bits_again_and_another_seed_the_same_answer() -> None:
    group = group_of(by_name("power-0.3"))
    first, again, other = (truncated_svd_group(group, 7, seed=seed, backend="cpu") for seed in (0, 0, 1))
    assert torch.equal(first.left, again.left) and torch.equal(first.right, again.right)
    assert not torch.equal(first.left, other.left)
    assert (first.sigma - other.sigma).abs().max() <= 2 * 2.0**-24 * first.sigma.max()  # each rounded once


def test_non_finite() -> None:
    x = torch.ones(200, 180)
    x[4, 5] = float("nan")
    with pytest.raises(NonFiniteError, match="got 1 "):
        truncated_svd_group(MatrixGroup(None, [[torch.ones(200, 180)], [x]]), 3, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormalise_fills_directions_that_vanish(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2, 300, 24, generator=generator, dtype=torch.float64))[0].to(dtype)
    w = torch.randn(2, 300, 8, generator=generator, dtype=torch.float64).to(dtype)
    w[0, :, 3] = w[0, :, 1]  # dependent
    w[0, :, 5] = 0
    w[1] = 0
    w = w - basis @ (basis.mT @ w)
    noise = torch.randn(300, 8, generator=generator, dtype=torch.float64)
    q, below = orthonormalise(w, basis, torch.tensor([1.0, 1.0], dtype=torch.float64), noise, NOISE[str(dtype)])
    whole = torch.cat([basis, q], 2).double()
    tolerance = 32 * torch.finfo(dtype).eps  # a rounding for each of the 32 directions
    assert (whole.mT @ whole - torch.eye(32, dtype=torch.float64)).abs().max() < tolerance
    assert (q.double() @ below - w.double()).abs().max() < tolerance * w.norm(dim=1).max()


@pytest.mark.parametrize("width", [8, 16])
def test_what_is_claimed_of_hard_spectra_holds(width: int) -> None:
    """A cut of `python -m benchmarks certificate`; large enough that the spaces are smaller than the whole."""
    ops = Loop(cpu)
    ops.width = width
    methods = Counter[str]()
    for case in hard_cases(69, first=2_000_000 + width, smallest=200, largest=260):
        group = MatrixGroup(None, [[torch.from_numpy(case.delta)]])
        try:
            svd = decompose(ops, group, case.rank, case.seed)
        except FactorOverflowError:
            continue
        left, right = svd.left[0].numpy(), svd.right[0].numpy()
        verdict = judge_claim(case.delta, left, right, svd.residual[0], svd.unique[0])
        assert verdict.ok, (
            f"{case.kind} {case.seed}, rank {case.rank} of {case.delta.shape}: {svd.method[0]}: {verdict}"
        )
        methods[svd.method[0]] += 1
    assert methods["krylov"] > 20


def test_copies_that_a_block_cannot_find_are_not_missed() -> None:
    """Nine copies of the leading value and a block of eight: its residuals do not see the ninth."""
    sigma = np.r_[np.ones(9), 0.8 * np.arange(1, 190) ** -0.5]
    delta = from_spectrum(np.random.default_rng(4), 240, 220, sigma).astype(np.float32)
    for rank in (8, 9, 10):
        group = MatrixGroup(None, [[torch.from_numpy(delta)]])
        svd = truncated_svd_group(group, rank, backend="cpu")
        judge(group, svd, rank)
        assert svd.unique[0] == (rank != 8)


def test_error_bound_of_a_turned_vector() -> None:
    """theta 4, 1 | 0.5 and a right vector turned by an angle: the bound is not below the true error of L, and not far above.
    With a pair beyond a small gap at the cut the same residual is worth the large gap behind it."""
    double = {"dtype": torch.float64}
    count, upper = torch.tensor([2]), torch.tensor([0.5], **double)
    theta = torch.tensor([[4.0, 1.0]], **double)
    for angle in (1e-2, 1e-4, 1e-6):
        rho = torch.tensor([[0.0, (1.0 - 0.5) * angle]], **double)
        error = float(error_bound(theta, rho, 2, count, upper))
        true = np.sqrt((1.0 + 0.5) * angle**2 / 5.0)
        assert true <= error * (1 + 1e-9) and error <= 1.1 * true + 1e-12
    theta = torch.tensor([[4.0, 1.0, 1.0 - 1e-4]], **double)
    rho = torch.tensor([[0.0, 1e-6, 1e-6]], **double)
    alone = float(error_bound(theta, rho, 2, count, theta[:, 2]))
    apart = float(error_bound(theta, rho, 2, count + 1, upper))
    assert alone > 5e-3 and 8e-7 < apart < 2e-6


def space(values: torch.Tensor, width: int, passes: int, seed: int = 0) -> Spectrum:
    """What a space grown from `width` random vectors knows of the diagonal matrix with these values."""
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    block = torch.linalg.qr(torch.randn(n, width, generator=generator, dtype=torch.float64))[0]
    basis, below = block, torch.zeros(width, width, dtype=torch.float64)
    for _ in range(passes):
        image = values.unsqueeze(1) * basis[:, -width:]
        for _ in range(2):
            image = image - basis @ (basis.T @ image)
        block, below = torch.linalg.qr(image)
        basis = torch.cat([basis, block], 1)
    inner = basis[:, :-width]
    theta, vectors = torch.linalg.eigh(inner.T @ (values.unsqueeze(1) * inner))
    theta, vectors = theta.flip(0), vectors.flip(1)
    ends = below @ vectors[-width:]
    return Spectrum(*(x.unsqueeze(0) for x in (theta, vectors, ends)), width, n, (2e-16, 2e-13, 2e-13))


def test_what_lies_beyond_the_cut_is_bounded_from_above() -> None:
    """The next Ritz value lies below the next eigenvalue; the bound must not, however early it is asked for."""
    values = torch.tensor([1.0, 0.9, 0.8, *(0.5 - 1e-3 * np.arange(80))], dtype=torch.float64)
    known, low = 0, 0
    for passes in range(6, 20, 2):
        for seed in range(20):
            s = space(values, 2, passes, seed)
            ok, upper = s.cut(torch.tensor([[3]]), 3)
            known += bool(ok)
            low += bool(ok) and float(s.theta[0, 3]) < 0.4999
            assert not ok or upper >= 0.5, (passes, seed)
    assert known > 60 and low > 30  # nothing is trivial


def test_an_expert_that_is_the_base_does_not_disturb_the_others() -> None:
    """Nothing of its spectrum matters, at a check at which the others are not ready."""
    base, tuned = (to_torch(x.copy()) for x in by_name("power-0.5").matrices())
    group = MatrixGroup([base], [[tuned, base]])
    svd = truncated_svd_group(group, 7, backend="cpu")
    judge(group, svd, 7)
    assert not svd.left[1].any() and svd.residual[1] <= 1e-5


def test_an_eigenvector_is_called_unseen_where_it_is() -> None:
    """Spaces grown from one, two and three vectors, of a matrix with a double value: the second copy can hide from one."""
    values = torch.tensor([3.0, 3.0, *np.linspace(2.0, 0.1, 58)], dtype=torch.float64)
    for width, settled in ((1, False), (2, False), (3, True)):
        s = space(values, width, 42 // width)
        copies = torch.tensor([[min(width, 2)]])
        assert bool(s.unseen(s.theta[:, :1], copies)[0, 0] <= 1e-3) == settled, width
        between = torch.tensor([[2.5, 4.0]], dtype=torch.float64)  # no eigenvalue there, and the space knows
        assert (s.unseen(between, copies.expand(1, 2)) <= 1e-6).all()


def test_small_spaces_are_not_iterated() -> None:
    assert not krylov_pays(128, 7, 8) and krylov_pays(192, 7, 8) and not krylov_pays(256, 40, 8)
    assert all(krylov_limit(n, r) + 16 <= n for n, r in ((384, 7), (768, 64), (1280, 64)) if krylov_pays(n, r, 16))


def test_the_users_matmul_precision_is_ignored_and_restored() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        group = group_of(by_name("spikes"))
        judge(group, truncated_svd_group(group, 7, backend="cpu"), 7)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def _tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to the 10 stored mantissa bits of tf32."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def _product(a: torch.Tensor, b: torch.Tensor, terms: int) -> torch.Tensor:
    """a @ b as tensor cores form it: exact products of tf32 factors; three terms: the roundings' remainders as well."""
    a1, b1 = _tf32(a), _tf32(b)
    total = a1.double() @ b1.double()
    if terms == 3:
        total += _tf32(a - a1).double() @ b1.double() + a1.double() @ _tf32(b - b1).double()
    return total.float()


@pytest.mark.parametrize(("terms", "holds"), [(1, False), (3, True)])
def test_one_tf32_product_breaks_the_contract_and_three_keep_it(terms: int, holds: bool) -> None:
    """Why the Triton kernels ask for tf32x3: iterating on rounded products converges to the wrong L."""
    case = by_name("power-0.5")
    base, tuned = (to_torch(x.copy()) for x in case.matrices())
    delta = tuned - base
    x = torch.linalg.qr(torch.randn(delta.shape[1], 16, generator=torch.Generator().manual_seed(0)))[0]
    for _ in range(90):
        y = _product(delta, x, terms)
        x = torch.linalg.qr(_product(delta.T, y, terms))[0]
    y = _product(delta, x, terms)
    _, vectors = torch.linalg.eigh(y.double().T @ y.double())
    v = x.double() @ vectors[:, -7:]
    low = _product(delta, v.float(), terms).double() @ v.T
    verdict = judge_low_rank(delta.numpy(), low.numpy(), 7)
    assert verdict.ok == holds, verdict
    if not holds:
        assert verdict.error > 5e-5


def test_groups_equal_their_members() -> None:
    cases = [by_name("power-0.5")] * 1
    group = group_of(*cases)
    svd = truncated_svd_group(group, 7, backend="cpu")
    threshold = residual_threshold_group(group, svd.left, svd.right, 1000, backend="cpu")
    out = [torch.zeros(384, 384)]
    stats = merge_update_group(group, out, svd.left, svd.right, threshold, [2.0], backend="cpu").stats()
    assert stats[0].kept == 1000
    base, tuned = (to_torch(x.copy()) for x in cases[0].matrices())
    alone, expected = (base, tuned, svd.left[0], svd.right[0]), torch.zeros(384, 384)
    assert threshold.thresholds() == [kernels.residual_threshold(*alone, 1000, backend="cpu")]
    assert stats[0] == kernels.merge_update(expected, *alone, threshold.thresholds()[0], 2.0, backend="cpu")
    assert torch.equal(out[0], expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MatrixGroup(None, []), "expected at least one matrix"),
        (lambda: MatrixGroup(None, [[torch.ones(2, 3)], [torch.ones(3, 2)]]), r"tuned: expected a matrix \[2, 3\]"),
        (lambda: MatrixGroup([torch.ones(2, 3)], [[torch.ones(2, 3)]] * 2), "bases: expected 2, one per row"),
        (lambda: MatrixGroup(None, [[torch.ones(2, 3)] * 2, [torch.ones(2, 3)]]), r"tuned\[1\]: expected 2 experts"),
        (lambda: MatrixGroup(None, [[torch.ones(2, 3)], [torch.ones(2, 3).half()]]), "of dtype float32, got"),
        (lambda: MatrixGroup(None, [[torch.ones(4, 4).T[:, ::2]]]), "contiguous rows"),
    ],
)
def test_groups_that_do_not_fit(build: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build()  # type: ignore[operator]


def test_empty_matrices_are_fine() -> None:
    group = MatrixGroup(None, [[torch.ones(0, 5)], [torch.ones(0, 5)]])
    threshold = residual_threshold_group(group, None, None, 0, backend="cpu")
    assert threshold.cut.tolist() == [0, 0]
    stats = merge_update_group(group, [torch.ones(0, 5)] * 2, None, None, threshold, [1.0], backend="cpu")
    assert stats.kept.tolist() == [0, 0]
