"""What a GPU backend has to do, on the shared cases. Not collected by its name:

`test_gpu_backends.py` runs it on a device, `test_triton_interpreted.py` and `test_cuda_emulated.py` on the CPU.
"""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lors
import lors_kernels as kernels
from helpers import require_backend
from lors_kernels import KEEP_NONE, Keep, NonFiniteError, Threshold, keep_limit, reference
from lors_kernels.arrays import to_torch
from lors_kernels.group import GroupThreshold, MatrixGroup
from lors_kernels.grouped import (
    gram_apply_group,
    merge_update_group,
    residual_threshold_group,
    ties_update_group,
    truncated_svd_group,
)
from lors_kernels.testing.cases import CASES, Case, by_name, hard_spectra
from lors_kernels.testing.numerics import (
    delta_of,
    exact_selection,
    judge_claim,
    judge_low_rank,
    selected,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("LORS_TEST_CUDA_EMULATION")  # path of the emulated CUDA module
DEVICE = "cpu" if INTERPRETED or EMULATED else "cuda"
if EMULATED:
    from cuda_emulation import install

    install(EMULATED)
# The interpreter takes 10 ms per tile: the cases that differ in kind, and only small ones.
FEW = (
    "1x1",
    "2x3",
    "odd",
    "bit-ladder",
    "all-equal",
    "few-values",
    "denormals",
    "signed-zeros",
    "fp16-bf16",
    "bf16-fp32",
)
TIES = [
    (1, 1, "float32", True, True, 0), (1, 37, "float32", True, True, 7), (33, 67, "bfloat16", True, False, 2**33),
    (24, 520, "float32", True, True, 0), (24, 520, "float16", False, True, 0), (17, 264, "bfloat16", False, False, 5),
]  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The emulation takes a microsecond per thread and barrier: all cases but those that add size only.


def cuda_only(test: Any) -> Any:
    """A test of the CUDA module, which the interpreter of Triton's kernels has not got."""
    return None if INTERPRETED else pytest.mark.usefixtures("cuda_backend")(test)


@pytest.fixture
def cuda_backend() -> str:
    return require_backend("cuda")


LENGTHY = ("wide", "tall", "power-0.5", "spikes", "flat-noise")
SELECTED = (
    [by_name(name) for name in FEW]
    if INTERPRETED
    else [case for case in CASES if not case.large and not (EMULATED and case.name in LENGTHY)]
)


@pytest.fixture(params=["triton"] if INTERPRETED else ["cuda"] if EMULATED else ["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return require_backend(request.param)


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer, larger tiles under the interpreter, where a tile costs the same whatever its size."""
    if INTERPRETED:
        from lors_kernels.backends.triton import merge_update, residual_threshold

        monkeypatch.setitem(residual_threshold.BLOCK, "BM", 32)
        monkeypatch.setitem(residual_threshold.BLOCK, "BN", 128)
        monkeypatch.setitem(residual_threshold.WIDE_BLOCK, "BN", 8192)
        monkeypatch.setitem(merge_update.BLOCK, "BM", 32)
        monkeypatch.setitem(merge_update.BLOCK, "BN", 128)


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    base, tuned = (to_torch(x.copy()).to(DEVICE) for x in case.matrices())
    return base, tuned


def factors(base: torch.Tensor, tuned: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    svd = reference.truncated_svd(base, tuned, rank)
    return svd.left.contiguous(), svd.right.contiguous()


def residual(base: torch.Tensor, tuned: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    """delta - L with the kernels' bits: fused multiply-adds in the order of the rank (exact products in float64)."""
    low = torch.zeros(tuned.shape, dtype=torch.float32, device=tuned.device)
    for r in range(left.shape[1]):
        product = left[:, r : r + 1].double() * right[:, r].double()
        low = (low.double() + product).float()
    return (reference.delta(base, tuned) - low).cpu().numpy()


@pytest.mark.parametrize("case", SELECTED, ids=lambda case: case.name)
@pytest.mark.parametrize("side", ["right", "left"])
def test_gram_apply(case: Case, side: str, backend: str) -> None:
    base, tuned = tensors(case)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tuned.shape[1 if side == "right" else 0], 9, generator=generator).to(DEVICE)
    found = kernels.gram_apply(base, tuned, x, side=side, backend=backend).double()
    delta = reference.delta(base, tuned).double()
    truth = delta.T @ (delta @ x.double()) if side == "right" else delta @ (delta.T @ x.double())
    naive = delta.float().T @ (delta.float() @ x) if side == "right" else delta.float() @ (delta.float().T @ x)
    error, allowed = (found - truth).norm(), 4 * (naive.double() - truth).norm() + 1e-6 * truth.norm() + 1e-44
    assert error <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [264] if INTERPRETED else [8, 264, 520, 776, 1032, 1280, 1288])
def test_gram_apply_of_every_length_that_has_its_own_kernel(inner: int, dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(inner)
    tuned = torch.randn(24, inner, generator=generator).to(dtype).to(DEVICE)
    for matrix, side in ((tuned, "right"), (tuned.T.contiguous(), "left")):
        x = torch.randn(inner, 3, generator=generator).to(DEVICE)
        found = kernels.gram_apply(None, matrix, x, side=side, backend=backend).double()
        truth = tuned.double().T @ (tuned.double() @ x.double())
        assert (found - truth).norm() <= 1e-6 * tuned.double().norm() ** 2 * x.norm()


@cuda_only
@pytest.mark.parametrize("inner", [8, 264, 520, 776, 1032, 1280])
def test_gram_apply_where_a_block_lacks_room_for_tensor_cores(inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from lors_kernels.backends import cuda_module

    class Small:
        def __getattr__(self, name: str) -> Any:
            return (lambda device: 0) if name == "shared_memory" else getattr(library, name)

    library = cuda_module.library()
    generator = torch.Generator().manual_seed(inner)
    tuned = torch.randn(70, inner, generator=generator).to(DEVICE)
    x = torch.randn(inner, 9, generator=generator).to(DEVICE)
    expected = kernels.gram_apply(None, tuned, x, backend="cuda")
    monkeypatch.setattr(cuda_module, "library", Small)
    truth = tuned.double().T @ (tuned.double() @ x.double())
    for matrix, side in ((tuned, "right"), (tuned.T.contiguous(), "left")):
        if side == "left":  # 70 columns are no vectors: 72
            matrix = torch.cat([matrix, matrix.new_zeros(inner, 2)], 1)
        found = kernels.gram_apply(None, matrix, x, side=side, backend="cuda")
        assert (found.double() - truth).norm() <= 1e-6 * tuned.double().norm() ** 2 * x.norm()
        assert not torch.equal(found, expected), "other kernels"
    half = torch.ones(16, 1280, device=DEVICE).half()
    with pytest.raises(RuntimeError, match="a block has too little shared memory"):
        kernels.gram_apply(None, half, torch.ones(1280, 1, device=DEVICE), backend="cuda")


def largest() -> tuple[torch.Tensor, torch.Tensor]:
    """Differences beyond float16's largest number, among ordinary ones."""
    base, tuned = (torch.randn(40, 264, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    base[3, 7], tuned[3, 7], base[20, 200], tuned[20, 200] = -6e4, 6.5e4, 4e4, -4e4
    return base, tuned


def inexact() -> tuple[torch.Tensor, torch.Tensor]:
    """Differences that float16 has not got: large against small, down to its denormals."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(40, 264, generator=generator) * 10.0 ** torch.randint(-7, 4, (40, 264), generator=generator)
    return base, base * torch.randn(40, 264, generator=generator)


@pytest.mark.parametrize("make", [largest, inexact])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_apply_loses_nothing(dtype: torch.dtype, make: Any, size: float, side: str, backend: str) -> None:
    if backend == "triton" and (make is largest or size != 1.0 or dtype != torch.float16):
        return  # no promise of Triton's
    gain = 1.0 if size != 1.0 or dtype == torch.float16 else 2.0**-40  # of numbers that float16 has not got
    base, tuned = ((gain * x).to(dtype).to(DEVICE) for x in make())
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(264, 9, generator=generator) * size * 10.0 ** -torch.arange(9)
    delta = tuned.double() - base.double()
    if side == "left":
        base, tuned = base.T[:, :-3], tuned.T[:, :-3]  # 264 columns of A.T, of which 37 rows matter: an odd length
        base, tuned = (torch.cat([y.T, y.T.new_zeros(3, 264)])[:37] for y in (base, tuned))
        delta, x = (tuned.double() - base.double()).T, x[:37]
    found = kernels.gram_apply(base, tuned, x.to(DEVICE), side=side, backend=backend).double()
    for vector in range(9):
        truth = delta.T @ (delta @ x[:, vector].double().to(DEVICE))
        assert (found[:, vector] - truth).norm() <= 1e-6 * truth.norm(), vector


@cuda_only
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_first_pass_accounts_for_what_it_reads(dtype: torch.dtype, side: str) -> None:
    from lors_kernels.backends import cuda

    generator = torch.Generator().manual_seed(9)
    base = torch.randn(40, 264, generator=generator)
    tuned = [base + 10.0**number * torch.randn(40, 264, generator=generator) for number in (-2, 4, 0)]
    base[7, 9], tuned[1][7, 9] = 6e4, -6e4  # a difference beyond float16's largest number
    tuned[2][3, 4], tuned[2][39, 260] = math.inf, math.nan
    group = MatrixGroup([base.to(dtype).to(DEVICE)], [[x.to(dtype).to(DEVICE) for x in tuned]])
    x = torch.randn(3, 264 if side == "right" else 40, 8, generator=generator).to(DEVICE)
    z, energy, bad, top = cuda.GROUPED.first_pass(group, x, side=side)
    assert torch.equal(z[:2], cuda.GROUPED.gram_apply(group, x, side=side)[0][:2])
    expected = cuda.GROUPED.measure(group)
    torch.testing.assert_close(energy[:2], expected[0][:2], rtol=2e-6, atol=0)
    torch.testing.assert_close(top[:2], expected[2][:2], rtol=2.0**-11, atol=0)
    assert bad.tolist() == [False, False, True] and expected[1].tolist() == [0, 0, 2]


@cuda_only
def test_what_is_not_finite_stops_a_decomposition_behind_its_first_pass() -> None:
    tuned = torch.randn(200, 200, generator=torch.Generator().manual_seed(9))
    tuned[3, 4], tuned[190, 160] = math.inf, math.nan
    with pytest.raises(NonFiniteError) as caught:
        truncated_svd_group(MatrixGroup(None, [[tuned.half().to(DEVICE)]]), 3, backend="cuda")
    assert caught.value.count == 2


@pytest.mark.parametrize("case", SELECTED, ids=lambda case: case.name)
def test_threshold_is_exact_and_update_keeps_the_same_entries(case: Case, backend: str) -> None:
    base, tuned = tensors(case)
    m, n = tuned.shape
    left, right = factors(base, tuned, case.rank)
    plain = delta_of(*case.matrices())
    reduced = residual(base, tuned, left, right)
    for k in sorted({0, 1, m * n // 5, m * n}):
        mask = selected(plain, kernels.residual_threshold(base, tuned, k=k, backend=backend))
        assert (mask == exact_selection(plain, k)).all()
        threshold = kernels.residual_threshold(base, tuned, left, right, k, backend=backend)
        assert threshold.cut <= m * n
        if (
            backend != "triton" or not INTERPRETED
        ):  # rounding of a float64 sum is that of a fused multiply-add but for ties
            assert (selected(reduced, threshold) != exact_selection(reduced, k)).sum() <= 2
        out = torch.zeros(m, n, device=DEVICE)
        stats = kernels.merge_update(out, base, tuned, left, right, threshold, 1.0, backend=backend)
        assert stats.kept == k and stats.non_finite == 0
        if k == m * n and k > 1:
            torch.testing.assert_close(out, reference.delta(base, tuned), rtol=1e-5, atol=1e-6 * float(out.abs().max()))


@pytest.mark.parametrize("columns", [130, 136])  # rows with and without 16-byte alignment
def test_update_of_several_experts_in_every_dtype(columns: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for dtype in DTYPES:
        base = (torch.randn(37, columns, generator=generator) * 0.05).to(dtype).to(DEVICE)
        tuned = [
            (base.float() + 0.01 * torch.randn(37, columns, generator=generator).to(DEVICE)).to(dtype) for _ in range(3)
        ]
        pairs = [factors(base, t, 5) for t in tuned]
        lefts, rights = [p[0] for p in pairs], [p[1] for p in pairs]
        thresholds = [
            kernels.residual_threshold(base, t, *p, 481, backend=backend) for t, p in zip(tuned, pairs, strict=True)
        ]
        out, weights = base.clone(), [0.2, -1.5, 0.7]
        kernels.merge_update(out, base, tuned, lefts, rights, thresholds, weights, backend=backend)
        truth = base.double()
        for t, (left, right), threshold, weight in zip(tuned, pairs, thresholds, weights, strict=True):
            rest = torch.from_numpy(residual(base, t, left, right)).to(DEVICE)
            kept = torch.where(reference.keep_mask(rest, threshold), rest, 0)
            truth += weight * (left.double() @ right.double().T + kept.double())
        # Half a unit in the last place; the interpreter cuts float32 off to bfloat16 where a device rounds.
        step = {torch.float32: 2e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8 * (2 if INTERPRETED else 1)}[dtype]
        wrong = int(((out.double() - truth).abs() > 1.01 * step * truth.abs() + 1e-6).sum())
        assert wrong <= 2, dtype  # an entry on the threshold, where the emulated residual rounds the other way


def test_strided_and_misaligned_rows_leave_their_surroundings_alone(backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    whole = torch.randn(40, 200, generator=generator).to(DEVICE)
    base, tuned = whole[:30, 3:68], whole[5:35, 71:136]
    room = torch.full((32, 99), 77.0, device=DEVICE)
    out = room[1:31, 17:82]
    out.zero_()
    k = 400
    delta = (tuned - base).cpu().numpy()
    threshold = kernels.residual_threshold(base, tuned, k=k, backend=backend)
    mask = exact_selection(delta, k)
    assert (selected(delta, threshold) == mask).all()
    kernels.merge_update(out, base, tuned, threshold=threshold, weight=2.0, backend=backend)
    np.testing.assert_array_equal(out.cpu().numpy(), np.where(mask, 2 * delta, 0))
    out.fill_(77.0)
    assert (room == 77.0).all()


def test_group_of_matrices_and_experts_equals_each_alone(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    shape, rank, k = (48, 40), 3, 300
    bases = [torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2)]
    tuned = [[b + 0.1 * torch.randn(shape, generator=generator).to(DEVICE) for _ in range(3)] for b in bases]
    group = MatrixGroup(bases, tuned)
    x = torch.randn(6, 40, 8, generator=generator).to(DEVICE)
    z = gram_apply_group(group, x, backend=backend)
    stack = [factors(*group.pair(p), rank) for p in range(6)]  # type: ignore[arg-type]
    left, right = (torch.stack([pair[side] for pair in stack]) for side in (0, 1))
    threshold = residual_threshold_group(group, left, right, k, backend=backend)
    out = [b.clone() for b in bases]
    stats = merge_update_group(group, out, left, right, threshold, [1.0, 2.0, 3.0], backend=backend)
    assert stats.kept.tolist() == [k] * 6
    for p, found in enumerate(threshold.thresholds()):
        base, mine = group.pair(p)
        alone = kernels.gram_apply(base, mine, x[p], backend=backend)
        torch.testing.assert_close(z[p], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))
        assert found == kernels.residual_threshold(base, mine, left[p], right[p], k, backend=backend)
    for i, base in enumerate(bases):
        alone, span = base.clone(), slice(3 * i, 3 * i + 3)
        kernels.merge_update(
            alone, base, tuned[i], list(left[span]), list(right[span]), threshold.thresholds()[span], [1.0, 2.0, 3.0],
            backend=backend,
        )  # fmt: skip
        assert torch.equal(alone, out[i])


@pytest.mark.parametrize("shape", [(3, 9_001)] if INTERPRETED else [(1, 20_000), (3, 9_001), (2, 8_200)], ids=str)
def test_long_rows_are_cut_in_parts_and_in_order(shape: tuple[int, int], backend: str) -> None:
    generator = torch.Generator().manual_seed(6)
    tuned = torch.randint(-3, 4, shape, generator=generator).float().to(DEVICE)  # ties in every part
    values = tuned.cpu().numpy()
    for k in (11_000,) if INTERPRETED else (1, 3000, shape[0] * shape[1] - 1):
        threshold = kernels.residual_threshold(None, tuned, k=k, backend=backend)
        assert (selected(values, threshold) == exact_selection(values, k)).all(), k
    out = torch.zeros_like(tuned)
    stats = kernels.merge_update(out, None, tuned, None, None, threshold, 1.0, backend=backend)
    assert stats.kept == k
    np.testing.assert_array_equal(out.cpu().numpy(), np.where(exact_selection(values, k), values, 0))


def test_a_long_outer_side_is_summed_in_parts(backend: str) -> None:
    generator = torch.Generator().manual_seed(7)
    tuned, x = (torch.randn(rows, columns, generator=generator).to(DEVICE) for rows, columns in ((4100, 3), (3, 1)))
    found = kernels.gram_apply(None, tuned, x, backend=backend).double()
    truth = tuned.double().T @ (tuned.double() @ x.double())
    assert (found - truth).norm() <= 1e-6 * tuned.double().norm() ** 2 * x.norm()


def test_rows_more_than_two_to_the_31_entries_apart(backend: str, tmp_path: Path) -> None:
    """Three rows in a sparse file: an offset that is reckoned in 32 bits leaves it or hits the wrong row."""
    if DEVICE != "cpu":
        base, tuned, out = (
            torch.empty_strided((3, 40), (2**31 + 8, 1), dtype=torch.float16, device=DEVICE) for _ in "abc"
        )
    else:
        whole = np.memmap(tmp_path / "sparse", np.float16, "w+", shape=(2 * (2**31 + 8) + 256,))
        rows = torch.from_numpy(whole).as_strided((3, 256), (2**31 + 8, 1))
        base, tuned, out = rows[:, :40], rows[:, 64:104], rows[:, 128:168]
    generator = torch.Generator().manual_seed(4)
    for x in (base, tuned):
        x.copy_(torch.randint(-4, 5, (3, 40), generator=generator))
    out.zero_()
    delta = (tuned.float() - base.float()).cpu().numpy()
    threshold = kernels.residual_threshold(base, tuned, k=50, backend=backend)
    mask = exact_selection(delta, 50)
    assert (selected(delta, threshold) == mask).all()
    kernels.merge_update(out, base, tuned, threshold=threshold, backend=backend)
    np.testing.assert_array_equal(out.float().cpu().numpy(), np.where(mask, delta, 0))
    kernels.ties_update(out, base, [tuned], [Keep()], [1.0], elect=False, normalize=False, backend=backend)
    np.testing.assert_array_equal(out.float().cpu().numpy(), np.where(mask, delta, 0) + delta)
    for side, x in (("right", torch.eye(40)), ("left", torch.eye(3))):
        z = kernels.gram_apply(base, tuned, x.to(DEVICE), side=side, backend=backend)
        truth = delta.T @ delta if side == "right" else delta @ delta.T
        np.testing.assert_array_equal(z.cpu().numpy(), truth)


def test_groups_that_are_empty_or_on_several_devices(backend: str) -> None:
    empty = MatrixGroup(None, [[torch.ones(0, 5, device=DEVICE)]])
    assert gram_apply_group(empty, torch.ones(1, 5, 2, device=DEVICE), backend=backend).tolist() == [[[0.0] * 2] * 5]
    assert residual_threshold_group(empty, None, None, 0, backend=backend).cut.tolist() == [0]
    assert ties_update_group(empty, None, [Keep()], [1.0], backend=backend).kept.tolist() == [0]
    here, there = torch.ones(2, 3, device=DEVICE), torch.ones(2, 3, device="meta")
    for bases, tuned in ((None, [[here, there]]), ([there], [[here]]), ([here, there], [[here], [here]])):
        with pytest.raises(ValueError, match="expected device .* like tuned, got"):
            MatrixGroup(bases, tuned)
    group = MatrixGroup(None, [[here]])
    with pytest.raises(ValueError, match="x: expected a float32 tensor .*, got .* on meta"):
        gram_apply_group(group, torch.ones(1, 3, 2, device="meta"), backend=backend)
    with pytest.raises(ValueError, match="out: expected device"):
        ties_update_group(group, [there], [Keep()], [1.0], backend=backend)


@pytest.mark.parametrize("method", ["lors", "ties", "dare_ties"])
def test_state_dicts_are_merged_where_they_are(method: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    prefix = "model.encoder.layers.0."
    shapes = {f"{prefix}self_attn.{x}_proj.weight": (24, 24) for x in "qv"} | {f"{prefix}fc1.weight": (56, 24)}
    shapes |= {"model.encoder.conv1.weight": (8, 6, 3), f"{prefix}fc1.bias": (56,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = {
        f"e{t}": {name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in base.items()}
        for t in range(3)
    }
    settings = {"density": 0.3, **({"rank": 3} if method == "lors" else {})}
    expected = lors.merge_state_dicts(base, experts, method, backend="cpu", **settings)

    def there(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: x.to(DEVICE) for name, x in state.items()}

    found = lors.merge_state_dicts(
        there(base), {label: there(state) for label, state in experts.items()}, method, backend=backend,
        device="cpu" if DEVICE == "cpu" else None, **settings,
    )  # fmt: skip
    for name, x in found.items():
        assert x.device.type == DEVICE and not torch.equal(x.cpu(), base[name])
        torch.testing.assert_close(x.cpu(), expected[name], rtol=2e-6, atol=2e-5)


if EMULATED:  # errors that a device would report

    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"CUDA_EMULATION_ERROR": "209"}, "cudaErrorNoKernelImageForDevice.*this build has .*rebuild with LORS_CUDA_ARCHS"),
            ({"CUDA_EMULATION_ERROR": "9"}, r"merge_update \[1 matrices x 1 experts, 5 x 7\]: cudaErrorInvalidConfiguration"),
            ({"CUDA_EMULATION_EARLIER": "700"}, "merge_update .*: not started: an earlier kernel .* cudaErrorIllegalAddress"),
        ],
    )  # fmt: skip
    def test_errors_name_the_kernel_and_the_shape(
        variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        x = torch.ones(5, 7)
        with pytest.raises(RuntimeError, match=message):
            kernels.merge_update(x.clone(), None, x, backend="cuda")
        for name in variables:
            monkeypatch.delenv(name)
        kernels.merge_update(x.clone(), None, x, backend="cuda")  # what was reported is not reported again

    def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
        from lors_kernels.backends import cuda_module

        monkeypatch.setattr(cuda_module, "stream", lambda device: (3, 0))
        with pytest.raises(RuntimeError, match="gram_apply .*: cudaErrorInvalidDevice: invalid device ordinal"):
            kernels.gram_apply(None, torch.ones(2, 2), torch.ones(2, 1), backend="cuda")
        monkeypatch.undo()
        kernels.gram_apply(None, torch.ones(2, 2), torch.ones(2, 1), backend="cuda")

    def test_every_operation_runs_on_its_device_and_leaves_the_callers_selected(
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from lors_kernels.backends import cuda_module

        emulation = ctypes.CDLL(EMULATED)
        emulation.emulation_launches.restype = ctypes.c_uint64
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
        monkeypatch.setattr(cuda_module, "stream", lambda device: (1, 0))
        for run in (
            lambda: kernels.gram_apply(None, x, torch.ones(16, 1), backend="cuda"),
            lambda: kernels.residual_threshold(None, x, k=3, backend="cuda"),
            lambda: kernels.merge_update(x.clone(), None, x, backend="cuda"),
            lambda: kernels.ties_update(x.clone(), None, [x], [Keep()], [1.0], backend="cuda"),
            lambda: kernels.truncated_svd(None, x, 2, backend="cuda"),
        ):
            before = [emulation.emulation_launches(number) for number in (0, 1)]
            run()
            after = [emulation.emulation_launches(number) for number in (0, 1)]
            assert after[0] == before[0] and after[1] > before[1]
            assert emulation.emulation_device() == 0


@cuda_only
@pytest.mark.parametrize("kind", ["random", "equal", "zero", "rounding", "graded", "tiny"])
@pytest.mark.parametrize(("n", "columns"), [(40, 0), (67, 16), (300, 136), (1280, 8)])
def test_a_block_is_made_orthonormal_in_one_launch(n: int, columns: int, kind: str) -> None:
    """Columns that are no basis at all are filled from the noise; what is said of w holds."""
    from lors_kernels.backends import cuda_module, truncated_svd

    generator = torch.Generator().manual_seed(n)
    full = torch.linalg.qr(torch.randn(2, n, columns + 8, generator=generator, dtype=torch.float64))[0].float()
    whole = torch.full((2, n, columns + 24), math.nan, device=DEVICE)
    whole[:, :, :columns] = full[:, :, :columns].to(DEVICE)
    basis = whole[:, :, :columns] if columns else None
    w = torch.randn(2, n, 8, generator=generator)
    if kind == "equal":
        w = w[:, :, :1].repeat(1, 1, 8)
    elif kind == "zero":
        w = torch.zeros_like(w)
    elif kind == "rounding" and columns:  # what is left of a block that the basis holds already
        q = full[:, :, :columns]
        w = q @ torch.randn(2, columns, 8, generator=generator)
        for _ in range(2):
            w = w - q @ (q.mT @ w)
    elif kind == "graded":
        w = full[:, :, columns:] * 10.0 ** -torch.arange(8)
    elif kind == "tiny":
        w = w * 1e-18
    w = w.to(DEVICE)
    scale = w.double().square().sum(1).amax(1).sqrt()
    if kind == "rounding":
        scale = torch.ones_like(scale)
    noise = torch.randn(n, 8, generator=generator, dtype=torch.float64).to(DEVICE)
    assert cuda_module.takes_orthonormalise(w, basis) and not cuda_module.takes_orthonormalise(w.double(), basis)
    q, below = truncated_svd.orthonormalise(w, basis, scale, noise, 1e-10)
    eye = torch.eye(8, dtype=torch.float64, device=DEVICE)
    assert (q.double().mT @ q.double() - eye).abs().max() <= 3e-6
    if basis is not None:
        assert (basis.double().mT @ q.double()).abs().max() <= 3e-6
    if basis is None:  # with a basis, w has a part of its own in it
        filled = w.double() + (noise / math.sqrt(n) if kind == "zero" else 0)
        assert ((q.double() @ below - filled).norm(dim=(1, 2)) <= 2e-6 * filled.norm(dim=(1, 2))).all()
    assert (below.tril(-1) == 0).all()
    if kind in ("random", "zero", "tiny"):  # else the noise decides, amplified by how little of w there is
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_module, "takes_orthonormalise", lambda *_: False)
            plain = truncated_svd.orthonormalise(w, basis, scale, noise, 1e-10)
        assert (plain[0] - q).abs().max() <= 1e-5
        assert (plain[1] - below).abs().max() <= 1e-6 * below.abs().max()
    again = cuda_module.orthonormalise(w, basis, scale, noise, 1e-10)
    assert torch.equal(q, again[0]) and torch.equal(below, again[1])


@cuda_only
@pytest.mark.parametrize("n", [40, 300, 1280])
def test_a_step_of_the_iteration_in_one_launch(n: int) -> None:
    """The same step in torch: the projection, what is beside it, and the next block."""
    from lors_kernels.backends import cuda_module
    from lors_kernels.backends.truncated_svd import Krylov

    generator = torch.Generator().manual_seed(n)
    pairs, steps = 2, 2 if n == 1280 else 4
    a = torch.randn(pairs, n, n, generator=generator) * torch.arange(1, n + 1) ** -0.7
    a = (a.mT @ a).to(DEVICE)  # G
    energy = a.diagonal(dim1=1, dim2=2).sum(1).double()
    fused, plain = (Krylov(pairs, n, 3, 8, energy, torch.float32, 7) for _ in "ab")
    with pytest.MonkeyPatch.context() as patch:
        launched, expand = [], cuda_module.expand
        patch.setattr(cuda_module, "expand", lambda *x: launched.append(1) or expand(*x))
        for krylov in (fused, plain):
            krylov.begin()
            krylov.basis[:] = fused.basis
            if krylov is plain:
                patch.setattr(cuda_module, "takes_orthonormalise", lambda *_: False)
            for _ in range(steps):
                krylov.expand(lambda x: (a @ x, x))
        assert len(launched) == steps
    s = fused.size
    assert s == plain.size == 8 * steps and torch.equal(fused.t, fused.t.mT)
    top = float(plain.t.abs().max())
    assert (fused.t[:, :s, :s] - plain.t[:, :s, :s]).abs().max() <= 3e-6 * top
    q = fused.basis[:, :, : s + 8].double()
    assert (q.mT @ q - torch.eye(s + 8, dtype=torch.float64, device=DEVICE)).abs().max() <= 3e-6
    newest = q[:, :, s - 8 : s]
    rest = a.double() @ newest - q[:, :, :s] @ fused.t[:, :s, s - 8 : s]
    assert (rest - q[:, :, s:] @ fused.below).abs().max() <= 3e-6 * top, "G Q = Q T + Q' B"
    assert (fused.below.norm(dim=(1, 2)) - plain.below.norm(dim=(1, 2))).abs().max() <= 1e-5 * top


if EMULATED:

    def test_a_device_with_less_shared_memory_gets_smaller_problems(monkeypatch: pytest.MonkeyPatch) -> None:
        from lors_kernels.backends import cuda_module

        monkeypatch.setenv("CUDA_EMULATION_SHARED", str(99 << 10))  # a consumer's
        library = cuda_module.library()
        n, rows = library.eigh_max_size(0), library.orthonormalise_max_rows(0)
        assert 96 <= n < 112 and 768 <= rows < 1280
        check_eigenpairs(symmetric("random", n))
        assert not cuda_module.takes_orthonormalise(torch.ones(1, rows + 1, 8), None)


def symmetric(kind: str, n: int) -> torch.Tensor:
    """Two hostile symmetric matrices [2, n, n]."""
    generator = torch.Generator().manual_seed(n)
    turn = torch.linalg.qr(torch.randn(2, n, n, generator=generator, dtype=torch.float64))[0]
    theta = {
        "random": torch.randn(n, generator=generator, dtype=torch.float64),
        "graded": 10.0 ** -torch.arange(n, dtype=torch.float64),
        "low rank": (torch.arange(n) < 3).double() * torch.arange(1, n + 1),
        "clustered": 1 + 1e-13 * torch.arange(n, dtype=torch.float64),
        "tiny": 1e-200 * torch.rand(n, generator=generator, dtype=torch.float64),
        "huge": 1e200 * torch.randn(n, generator=generator, dtype=torch.float64),
    }.get(kind)
    if theta is not None:
        a = (turn * theta) @ turn.mT
    elif kind == "diagonal":
        a = torch.diag_embed(torch.arange(2 * n, dtype=torch.float64).view(2, n).flip(1))
    elif kind == "zero":
        a = torch.zeros(2, n, n, dtype=torch.float64)
    else:  # ones: one eigenvalue n, all others 0
        a = torch.ones(2, n, n, dtype=torch.float64)
    return (a + a.mT) / 2


@cuda_only
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 33, 80])
@pytest.mark.parametrize(
    "kind", ["random", "graded", "low rank", "clustered", "tiny", "huge", "diagonal", "zero", "ones"]
)
def test_small_eigenproblems(kind: str, n: int) -> None:
    check_eigenpairs(symmetric(kind, n).to(DEVICE))


def check_eigenpairs(a: torch.Tensor) -> None:
    from lors_kernels.backends import cuda_module

    n = a.shape[1]
    theta, vectors, error = cuda_module.eigh(a)
    top = a.abs().amax((1, 2)).clamp_min(1e-300)
    residual = ((a @ vectors - vectors * theta.unsqueeze(1)).abs().amax((1, 2)) / top).max()
    skew = (vectors.mT @ vectors - torch.eye(n, dtype=a.dtype, device=a.device)).abs().max()
    assert residual <= 4e-15 * max(n, 8) and skew <= 4e-15 * max(n, 8), (float(residual), float(skew))
    assert ((theta - torch.linalg.eigvalsh(a)).abs() <= 4e-15 * max(n, 8) * top.unsqueeze(1)).all()
    assert (theta.diff(dim=1) >= 0).all()
    assert (error <= 1e-12).all() and error.max() >= 0.2 * max(float(residual), float(skew)), "what it says of itself"


@cuda_only
def test_small_eigenproblems_in_a_larger_array_and_of_the_largest_size() -> None:
    from lors_kernels.backends import cuda_module

    most = cuda_module.library().eigh_max_size(0)
    assert EMULATED is None or most == 160
    whole = torch.full((2, most + 8, most + 8), math.nan, dtype=torch.float64, device=DEVICE)
    whole[:, :most, :most] = symmetric("random", most).to(DEVICE)
    part = whole[:, :most, :most]
    assert cuda_module.takes_eigh(part) and not cuda_module.takes_eigh(whole[:, : most + 1, : most + 1])
    assert (
        not cuda_module.takes_eigh(part.float())
        and not cuda_module.takes_eigh(part.mT)
        and not cuda_module.takes_eigh(part[:0])
    )
    check_eigenpairs(part)


@cuda_only
def test_eigenpairs_that_are_wrong_are_found_again_by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from lors_kernels.backends import cuda_module
    from lors_kernels.backends.eigh import eigh

    a = symmetric("random", 9).to(DEVICE)
    right = torch.linalg.eigvalsh(a)
    assert torch.allclose(eigh(a)[0], right, rtol=1e-12)
    ours = cuda_module.eigh

    def wrong(a: torch.Tensor) -> tuple[torch.Tensor, ...]:
        theta, vectors, error = ours(a)
        theta[1], error[1] = 7.0, math.nan
        return theta, vectors, error

    monkeypatch.setattr(cuda_module, "eigh", wrong)
    theta, vectors = eigh(a)
    assert torch.allclose(theta, right, rtol=1e-12)
    assert torch.allclose(vectors @ torch.diag_embed(theta) @ vectors.mT, a, atol=1e-12)
    broken = a.clone()
    broken[0, 3, 4] = math.inf
    assert not cuda_module.eigh(broken)[2].isfinite().any() or not (ours(broken)[2][0] <= 1e-12)


def test_ties_across_chunks_are_cut_in_row_major_order(backend: str) -> None:
    tuned = torch.zeros(150, 8, device=DEVICE)
    tuned[3::5] = 0.5
    tuned[::2] *= -1
    values = tuned.cpu().numpy()
    for k in (1, 7, 8, 120, 239, 240, 241):
        threshold = kernels.residual_threshold(None, tuned, k=k, backend=backend)
        assert (selected(values, threshold) == exact_selection(values, k)).all(), k


def sampled(shape: tuple[int, int]) -> torch.Tensor:
    """Where the sample of a search looks: a piece of 32 entries of every part (csrc/cuda/residual_threshold.cu)."""
    from lors_kernels.backends import cuda_module
    from lors_kernels.counter_random import random_bits

    everything = shape[0] * shape[1] // 32
    pieces = min(cuda_module.library().threshold_sample(), everything // 2)
    draws = random_bits(0, 0, pieces).astype(np.int64)
    first = np.arange(pieces + 1) * everything // pieces
    at = first[:-1] + draws * np.diff(first) // 2**32
    mask = torch.zeros(everything, 32, dtype=torch.bool)
    mask[at] = True
    return mask.view(shape)


def hostile(kind: str, shape: tuple[int, int] = (40, 512)) -> tuple[torch.Tensor, tuple[int, ...], bool | None]:
    """(values, ks, whether two passes have to do; None: either)"""
    generator = torch.Generator().manual_seed(11)
    size = shape[0] * shape[1]
    ks: tuple[int, ...] = (1, 2, size // 5, size // 2, size - 1, size)
    x = torch.randn(shape, generator=generator)
    small = torch.arange(size).view(shape)
    if kind == "normal":
        return x, ks, True
    if kind == "graded":
        return x * 10.0 ** torch.randint(-30, 30, shape, generator=generator), ks, None
    if kind == "denormals":
        return (small * 1e-45).float(), ks, None
    if kind == "rows of every size":
        return x * 2.0 ** torch.arange(shape[0]).unsqueeze(1), ks, None
    if kind == "bit ladder":
        return (small.flip(1) + 0x3F800000).int().view(torch.float32), ks, None
    if kind == "all equal":
        return torch.full(shape, -0.75), (size // 5, size // 2), True
    if kind == "all equal, from end to end":
        return torch.full(shape, -0.75), ks, None
    if kind == "mostly zero":
        return torch.where(torch.rand(shape, generator=generator) < 0.1, x, 0.0), (*ks, size // 10), None
    if kind == "two values":
        return torch.where(small % 3 == 0, 1.5, -0.5), (size // 5, size // 2), True
    if kind == "between two values":
        return torch.where(small % 3 == 0, 1.5, -0.5), (size // 3, size // 3 + 1, size // 3 + 2), None
    if kind == "quarters":
        return (x * 4).round() / 4, ks, None
    mask = sampled(shape)
    if kind == "a sample that lies":
        return torch.where(mask, 1e-3 * x, x), (size // 5, size // 3), False
    assert kind == "more inside than there is room for"
    inside = 0.7 + 0.01 * torch.rand(shape, generator=generator)
    return torch.where(mask, torch.rand(shape, generator=generator), inside), (size * 3 // 10,), False


HOSTILE = (
    "normal", "graded", "denormals", "rows of every size", "bit ladder", "all equal", "all equal, from end to end", "mostly zero", "two values", "between two values", "quarters",
    "a sample that lies", "more inside than there is room for",
)  # fmt: skip


@cuda_only
@pytest.mark.parametrize("kind", HOSTILE)
def test_thresholds_by_two_passes_are_exact_for_any_input(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lors_kernels.backends import cuda

    monkeypatch.setattr(cuda, "SEARCHED", 0)
    x, ks, enough = hostile(kind)
    values = x.numpy()
    for k in ks:
        threshold, settled = cuda.GROUPED.search(MatrixGroup(None, [[x.to(DEVICE)]]), None, None, k)
        assert (selected(values, threshold.thresholds()[0]) == exact_selection(values, k)).all(), k
        assert threshold.non_finite.tolist() == [0]
        if enough is not None:
            assert bool(settled[0]) == enough, k


@cuda_only
def test_more_candidates_than_a_block_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    from lors_kernels.backends import cuda

    monkeypatch.setattr(cuda, "SEARCHED", 0)
    generator = torch.Generator().manual_seed(3)
    x = 0.1 * torch.rand(256, 512, generator=generator)
    x.view(-1)[torch.randperm(256 * 512, generator=generator)[:20_000]] = 10.0
    block = x[:128, :256].reshape(-1)
    block[torch.randperm(len(block), generator=generator)[:6000]] = 1 + 1e-6 * torch.arange(6000)
    x[:128, :256] = block.view(128, 256)
    k = int((x > 2).sum()) + 3000
    threshold, settled = cuda.GROUPED.search(MatrixGroup(None, [[x.to(DEVICE)]]), None, None, k)
    assert settled.tolist() == [1]
    assert (selected(x.numpy(), threshold.thresholds()[0]) == exact_selection(x.numpy(), k)).all()


@cuda_only
@pytest.mark.parametrize("rank", [0, 3, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_passes_and_radix_passes_see_the_same_bits(
    rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lors_kernels.backends import cuda

    generator = torch.Generator().manual_seed(rank)
    shape, k = (37, 544), 4000
    bases = [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for _ in range(2)]
    tuned = [[(b + 0.1 * torch.randn(shape, generator=generator).to(DEVICE)).to(dtype) for _ in "ab"] for b in bases]
    group = MatrixGroup(bases, tuned)
    left, right = (0.1 * torch.randn(4, size, rank, generator=generator).to(DEVICE) for size in shape)
    factors = (left, right) if rank else (None, None)
    found = []
    for least in (0, 1 << 40):
        monkeypatch.setattr(cuda, "SEARCHED", least)
        threshold, settled = cuda.GROUPED.search(group, *factors, k)
        assert settled.tolist() == [int(least == 0)] * 4
        found.append(threshold)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    out = [b.clone() for b in bases]
    stats = merge_update_group(group, out, *factors, found[0], [1.0, 0.5], backend="cuda")
    assert stats.kept.tolist() == [k] * 4 and stats.non_finite.tolist() == [0] * 4
    delta = torch.stack([t.double() - b.double() for b, row in zip(bases, tuned, strict=True) for t in row])
    low = left.double() @ right.double().mT
    energy = torch.stack([delta.square().sum((1, 2)), (delta - low).square().sum((1, 2))], 1)
    torch.testing.assert_close(stats.energy[:, :2], energy, rtol=1e-5, atol=0)


@cuda_only
def test_what_is_not_finite_is_counted_by_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from lors_kernels.backends import cuda

    monkeypatch.setattr(cuda, "SEARCHED", 0)
    x = torch.randn(70, 512, generator=torch.Generator().manual_seed(5))
    x[3, 4], x[33, 500], x[69, 255] = math.nan, math.inf, -math.inf
    large = torch.full_like(x, 3e38)  # finite, with squares that are not
    group = MatrixGroup(None, [[x.to(DEVICE), large.to(DEVICE)]])
    threshold, settled = cuda.GROUPED.search(group, None, None, 1000)
    assert threshold.non_finite.tolist() == [3, 0] and settled.tolist() == [0, 1]
    _, bad, top = cuda.GROUPED.measure(group)
    assert bad.tolist() == [3, 0] and top[1] == torch.tensor(3e38)
    finite = GroupThreshold.of([Threshold(0.5, 0, 0)] * 2, group.device)
    stats = merge_update_group(group, [torch.zeros_like(x).to(DEVICE)], None, None, finite, [1.0, 1.0], backend="cuda")
    assert stats.non_finite.tolist() == [3, 0]


def test_non_finite_entries_are_counted(backend: str) -> None:
    tuned = torch.ones(20, 24, device=DEVICE)
    tuned[3, 4], tuned[5, 6], tuned[19, 23] = math.nan, math.inf, -math.inf
    for k in (0, 10):
        with pytest.raises(NonFiniteError) as caught:
            kernels.residual_threshold(None, tuned, k=k, backend=backend)
        assert caught.value.count == 3
    out = torch.zeros(20, 24, device=DEVICE)
    assert kernels.merge_update(out, None, tuned, threshold=KEEP_NONE, backend=backend).non_finite == 3
    with pytest.raises(NonFiniteError):
        kernels.truncated_svd(None, tuned, 2, backend=backend)


SPECTRA = (
    ["clustered", "fp16", "hard near-copies", "hard graded"]
    if INTERPRETED or EMULATED
    else [case.name for case in (*CASES, *hard_spectra())]
)


@pytest.mark.parametrize("name", SPECTRA)
def test_svd_contract(name: str, backend: str) -> None:
    case = by_name(name)
    base, tuned = tensors(case)
    svd = kernels.truncated_svd(base, tuned, case.rank, backend=backend)
    low = (svd.left.double() @ svd.right.double().T).cpu().numpy()
    delta, factors = delta_of(*case.matrices()), [x.cpu().numpy() for x in (svd.left, svd.right)]
    for verdict in (judge_low_rank(delta, low, case.rank), judge_claim(delta, *factors, svd.residual, svd.unique)):
        assert verdict.ok, f"{svd.method} after {svd.passes} passes: {verdict}"
    assert svd.backend == backend


def ties_rules(base: torch.Tensor | None, tuned: list[torch.Tensor], start: int) -> list[Keep]:
    """A different kind of rule for every expert; thresholds count from `start`, as those of a whole tensor do."""
    size, key = tuned[0].numel(), 0xF123456789ABCDEF  # a key whose top bit is set

    def threshold(t: int, k: int) -> Threshold:
        found = kernels.residual_threshold(base, tuned[t], k=k, backend="reference")
        return found._replace(cut=found.cut + start)

    return [
        Keep(threshold(0, size // 3)),
        Keep(threshold(1, size // 2), threshold(1, size // 10), factor=1.5),
        Keep(key=key, limit=keep_limit(0.3)),
        Keep(threshold(3, size // 2), key=key + 1, limit=keep_limit(0.7)),
    ]


@pytest.mark.parametrize("case", TIES, ids=lambda case: "-".join(map(str, case)))
def test_ties_update_has_the_bits_of_the_reference(case: tuple[Any, ...], backend: str) -> None:
    m, n, dtype, elect, normalize, start = case
    generator = torch.Generator().manual_seed(m * n)
    dtype = getattr(torch, dtype)

    def matrix() -> torch.Tensor:  # quarters: many magnitudes and many sums are equal
        return (torch.randint(-8, 9, (m, n), generator=generator) / 4).to(dtype).to(DEVICE)

    base, tuned, weight = matrix(), [matrix() for _ in range(4)], [0.5, -1.0, 2.0, 0.3]
    keep = ties_rules(base, tuned, start)
    options: dict[str, Any] = {"elect": elect, "normalize": normalize, "scale": 0.7, "start": start}
    outs, stats = [], []
    for name in (backend, "reference"):
        out = base.to(torch.float32, copy=True)
        stats.append(kernels.ties_update(out, base, tuned, keep, weight, backend=name, **options))
        outs.append(out)
    assert torch.equal(*outs)
    for mine, right in zip(*stats, strict=True):
        assert (mine.kept, mine.non_finite) == (right.kept, right.non_finite)
        np.testing.assert_allclose(mine[:4], right[:4], rtol=1e-5)
    account = kernels.ties_update(None, base, tuned, keep, weight, backend=backend, **options)
    assert account == stats[0]
    if m * n > 100:
        assert 0 < stats[0][3].kept < m * n
        assert not torch.equal(outs[0], base.float())


def test_ties_update_of_a_group_equals_each_alone(backend: str) -> None:
    generator = torch.Generator().manual_seed(8)
    bases = [torch.randn(9, 72, generator=generator).half().to(DEVICE) for _ in range(2)]
    tuned = [[b + torch.randn(9, 72, generator=generator).half().to(DEVICE) for _ in range(4)] for b in bases]
    keep = [rule for base, row in zip(bases, tuned, strict=True) for rule in ties_rules(base, row, 0)]
    weight, out = [1.0, 1.0, -0.5, 2.0], [b.clone() for b in bases]
    stats = ties_update_group(MatrixGroup(bases, tuned), out, keep, weight, backend=backend).stats()
    for i, base in enumerate(bases):
        alone, span = base.clone(), slice(4 * i, 4 * i + 4)
        assert kernels.ties_update(alone, base, tuned[i], keep[span], weight, backend=backend) == stats[span]
        assert torch.equal(alone, out[i]) and not torch.equal(alone, base)


def test_ties_update_counts_what_is_not_finite(backend: str) -> None:
    tuned = torch.ones(20, 24, device=DEVICE)
    tuned[3, 4], tuned[5, 6], tuned[19, 23] = math.nan, math.inf, -math.inf
    (stats,) = kernels.ties_update(torch.zeros_like(tuned), None, [tuned], [Keep()], [1.0], backend=backend)
    assert stats.non_finite == 3


def test_same_bits_on_every_run(backend: str) -> None:
    base, tuned = tensors(by_name("fp16"))
    group = MatrixGroup([base], [[tuned]])
    first, second = (truncated_svd_group(group, 5, backend=backend) for _ in range(2))
    assert torch.equal(first.left, second.left) and torch.equal(first.right, second.right)
    threshold = GroupThreshold.of([Threshold(0.0, 0, 0)], group.device)
    outs = [torch.zeros(192, 128, device=DEVICE) for _ in range(2)]
    for out in outs:
        merge_update_group(group, [out], first.left, first.right, threshold, [1.0], backend=backend)
    assert torch.equal(*outs)
