"""What the operations read and write: the very numbers of an argument, and memory that is the caller's to change."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import lors_kernels as kernels
from lors_kernels import Keep, SparsePart, Threshold
from lors_kernels.arrays import is_torch, overlap
from lors_kernels.group import GroupThreshold, MatrixGroup
from lors_kernels.grouped import (
    gram_apply_group,
    merge_update_group,
    residual_threshold_group,
    ties_update_group,
    truncated_svd_group,
)

M, N, RANK = 6, 9, 2
HALF = Threshold(0.5, 0, 0)
Arguments = dict[str, torch.Tensor]


def test_arrays_while_another_thread_imports_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module is in sys.modules before it has its names: whoever uses numpy meanwhile must not stumble over it."""
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    assert not is_torch(np.ones(3))
    assert kernels.gram_apply(None, np.ones((3, 2), np.float32), np.ones((2, 1), np.float32)).tolist() == [[6.0], [6.0]]


def arguments() -> Arguments:
    generator = torch.Generator().manual_seed(0)
    shapes = {"base": (M, N), "tuned": (M, N), "x": (N, 3), "left": (M, RANK), "right": (N, RANK)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def merged(a: Arguments, backend: str) -> tuple[torch.Tensor, Any]:
    out = torch.ones(M, N)
    stats = kernels.merge_update(out, a["base"], a["tuned"], a["left"], a["right"], HALF, 0.3, backend=backend)
    return out, stats


def elected(a: Arguments, backend: str) -> tuple[torch.Tensor, Any]:
    out = torch.ones(M, N)
    return out, kernels.ties_update(out, a["base"], [a["tuned"]], [Keep(HALF)], [0.3], backend=backend)


def merged_group(a: Arguments, backend: str) -> tuple[torch.Tensor, Any]:
    out, group = torch.ones(M, N), MatrixGroup([a["base"]], [[a["tuned"]]])
    threshold = GroupThreshold.of([HALF], group.device)
    stats = merge_update_group(group, [out], a["left"][None], a["right"][None], threshold, [0.3], backend=backend)
    return out, stats.stats()


def elected_group(a: Arguments, backend: str) -> tuple[torch.Tensor, Any]:
    out, group = torch.ones(M, N), MatrixGroup([a["base"]], [[a["tuned"]]])
    return out, ties_update_group(group, [out], [Keep(HALF)], [0.3], backend=backend).stats()


def threshold_group(a: Arguments, backend: str) -> Any:
    group = MatrixGroup([a["base"]], [[a["tuned"]]])
    return residual_threshold_group(group, a["left"][None], a["right"][None], 11, backend=backend).thresholds()


READERS: dict[str, tuple[Callable[[Arguments, str], Any], tuple[str, ...]]] = {
    "gram_apply": (lambda a, b: kernels.gram_apply(a["base"], a["tuned"], a["x"], backend=b), ("base", "tuned", "x")),
    "residual_threshold": (
        lambda a, b: kernels.residual_threshold(a["base"], a["tuned"], a["left"], a["right"], 11, backend=b),
        ("base", "tuned", "left", "right"),
    ),
    "merge_update": (merged, ("base", "tuned", "left", "right")),
    "ties_update": (elected, ("base", "tuned")),
    "topk_mask": (lambda a, b: kernels.topk_mask(a["tuned"], 11, backend=b), ("tuned",)),
    "lors_delta": (lambda a, b: kernels.lors_delta(a["tuned"], 2, 0.3, backend=b), ("tuned",)),
    "gram_apply_group": (
        lambda a, b: gram_apply_group(MatrixGroup([a["base"]], [[a["tuned"]]]), a["x"][None], backend=b),
        ("base", "tuned", "x"),
    ),
    "residual_threshold_group": (threshold_group, ("base", "tuned", "left", "right")),
    "merge_update_group": (merged_group, ("base", "tuned", "left", "right")),
    "ties_update_group": (elected_group, ("base", "tuned")),
    "truncated_svd_group": (
        lambda a, b: truncated_svd_group(MatrixGroup([a["base"]], [[a["tuned"]]]), 2, backend=b)[:3],
        ("base", "tuned"),
    ),
}
READ = [(name, argument) for name, (_, reads) in READERS.items() for argument in reads]


@pytest.mark.parametrize(("name", "argument"), READ, ids=lambda part: part)
def test_lazily_negated_inputs_are_read_as_they_are(name: str, argument: str, backend: str) -> None:
    call, honest = READERS[name][0], arguments()
    lazy = honest | {argument: torch._neg_view(-honest[argument])}
    assert lazy[argument].is_neg() and torch.equal(lazy[argument], honest[argument])
    assert repr(call(lazy, backend)) == repr(call(honest, backend))


def test_truncated_svd_never_reads_behind_a_lazy_negation(backend: str) -> None:
    a = arguments()
    try:
        svd = kernels.truncated_svd(torch._neg_view(-a["base"]), a["tuned"], RANK, backend=backend)
    except ValueError as error:
        assert "lazily negated" in str(error)
    else:
        assert torch.equal(svd.left, kernels.truncated_svd(a["base"], a["tuned"], RANK, backend=backend).left)


@pytest.mark.parametrize(("name", "argument"), READ, ids=lambda part: part)
def test_parameters_are_read_without_a_gradient(name: str, argument: str, backend: str) -> None:
    call, honest = READERS[name][0], arguments()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = call(honest | {argument: torch.nn.Parameter(honest[argument])}, backend)
    assert repr(found) == repr(call(honest, backend))  # a tensor that is part of a graph says so


WRITERS = {
    "merge_update": lambda out, tuned, b: kernels.merge_update(out, None, tuned, backend=b),
    "ties_update": lambda out, tuned, b: kernels.ties_update(out, None, [tuned], [Keep()], [1.0], backend=b),
    "merge_update_group": lambda out, tuned, b: merge_update_group(
        MatrixGroup(None, [[tuned]]), [out], None, None, None, [1.0], backend=b
    ),
    "ties_update_group": lambda out, tuned, b: ties_update_group(
        MatrixGroup(None, [[tuned]]), [out], [Keep()], [1.0], backend=b
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_autograd_learns_of_a_write(name: str, backend: str) -> None:
    write, ones = WRITERS[name], torch.ones(M, N)
    weight = torch.nn.Parameter(torch.ones(M, N))
    with pytest.raises(ValueError, match="out: expected a tensor without gradient, or torch.no_grad.*Parameter"):
        write(weight, ones, backend)
    assert torch.equal(weight, ones)
    loss = (weight * weight).sum()
    with torch.no_grad():
        write(weight, ones, backend)
    assert torch.equal(weight, 2 * ones) and weight.requires_grad and weight.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    plain = torch.zeros(M, N)
    whole = torch.zeros(M + 2, N)
    for out, owner in ((plain, plain), (whole[1:-1], whole)):
        version = owner._version
        write(out, ones, backend)
        assert owner._version > version
    with torch.inference_mode():  # such tensors have no version, and no backward pass to warn
        out = torch.zeros(M, N)
        write(out, ones, backend)
        assert torch.equal(out, ones)


@pytest.mark.parametrize("name", WRITERS)
def test_a_lazily_negated_output_is_refused(name: str, backend: str) -> None:
    memory = torch.zeros(M, N)
    with pytest.raises(ValueError, match="out: expected .* lazy negation|out: expected numbers in memory"):
        WRITERS[name](torch._neg_view(memory), torch.ones(M, N), backend)
    assert not memory.any()


NUMPY_WRITERS = {
    "merge_update": WRITERS["merge_update"],
    "ties_update": WRITERS["ties_update"],
    "sparse_update": lambda out, tuned, b: kernels.sparse_update(
        out, SparsePart(np.full((M * N + 7) // 8, 255, np.uint8), tuned.ravel()), backend=b
    ),
}


@pytest.mark.parametrize("name", NUMPY_WRITERS)
@pytest.mark.parametrize("kind", ["flag", "bytes", "map"])
def test_read_only_memory_is_not_written(name: str, kind: str, backend: str, tmp_path: Path) -> None:
    raw = bytes(M * N * 4)
    (tmp_path / "map").write_bytes(raw)
    out = {
        "flag": lambda: np.zeros((M, N), np.float32),
        "bytes": lambda: np.frombuffer(raw, np.float32).reshape(M, N),
        "map": lambda: np.memmap(tmp_path / "map", np.float32, "r", shape=(M, N)),
    }[kind]()
    out.setflags(write=False)
    with pytest.raises(ValueError, match=r"out: expected memory that may be written, got a read-only \w+ of shape"):
        NUMPY_WRITERS[name](out, np.ones((M, N), np.float32), backend)
    assert not out.any() and raw == bytes(M * N * 4)


@pytest.mark.parametrize("name", NUMPY_WRITERS)
def test_one_row_or_column_with_a_negative_stride_is_written(name: str, backend: str) -> None:
    whole = np.zeros((M, N), np.float32)
    outs = [whole[::-1][:1]] if name == "sparse_update" else [whole[::-1][:1], whole[:, ::-1][:, :1]]
    for out in outs:
        if name == "sparse_update":
            part = SparsePart(np.array([255, 1], np.uint8), np.ones(N, np.float32))
            kernels.sparse_update(out, part, backend=backend)
        else:
            NUMPY_WRITERS[name](out, np.ones(out.shape, np.float32), backend)
        assert (out == 1).all()
        out[...] = 0
    assert not whole.any()


@pytest.mark.parametrize("rows", [(0, 5, 1, 6), (1, 6, 0, 5)], ids=["before", "behind"])
@pytest.mark.parametrize("place", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_an_output_that_overlaps_an_input_is_refused(rows: tuple[int, ...], place: Callable, backend: str) -> None:
    whole = np.arange(M * N, dtype=np.float32).reshape(M, N)
    before = whole.copy()
    out, read = place(whole)[rows[0] : rows[1]], place(whole)[rows[2] : rows[3]]
    other, tall = place(np.ones((5, N), np.float32)), place(np.ones((N, N), np.float32))
    with pytest.raises(ValueError, match="out: expected memory of its own, got .* that overlaps an input"):
        kernels.merge_update(out, read, other, backend=backend)
    with pytest.raises(ValueError, match="overlaps an input"):
        kernels.merge_update(out, None, [other, read], backend=backend)
    with pytest.raises(ValueError, match="overlaps an input"):
        kernels.merge_update(out, None, other, out, tall, backend=backend)
    with pytest.raises(ValueError, match="overlaps an input"):
        kernels.ties_update(out, read, [other], [Keep()], [1.0], backend=backend)
    assert (whole == before).all()


def test_sparse_update_does_not_read_what_it_writes(backend: str) -> None:
    out, part = np.ones((4, 8), np.float32), SparsePart(np.full(4, 255, np.uint8), np.ones(32, np.float32))
    mask, values = out.reshape(-1).view(np.uint8)[:4], out.reshape(-1)
    for wrong in (part._replace(mask=mask), part._replace(values=values)):
        with pytest.raises(ValueError, match="overlaps an input"):
            kernels.sparse_update(out, wrong, backend=backend)


@pytest.mark.parametrize("operation", ["merge_update", "ties_update"])
@pytest.mark.parametrize("same", ["base", "tuned"])
def test_an_output_may_be_an_input_itself(operation: str, same: str, backend: str) -> None:
    rng = np.random.default_rng(0)
    base, first, second = (rng.standard_normal((70, 33)).astype(np.float32) for _ in range(3))

    def run(out: np.ndarray, base: np.ndarray, tuned: list[np.ndarray]) -> None:
        if operation == "merge_update":
            kernels.merge_update(out, base, tuned, weight=[0.5, 0.25], backend=backend)
        else:
            kernels.ties_update(out, base, tuned, [Keep(), Keep()], [0.5, 0.25], backend=backend)

    shared = (base if same == "base" else first).copy()
    expected = shared.copy()
    run(expected, base, [first, second])
    run(shared, shared if same == "base" else base, [shared if same == "tuned" else first, second])
    assert (shared == expected).all() and (shared != (base if same == "base" else first)).any()


def test_matrices_of_a_group_do_not_share_their_outputs(backend: str) -> None:
    ones = [torch.ones(M, N) for _ in range(3)]
    group = MatrixGroup([ones[0], ones[1]], [[ones[2]], [ones[2]]])
    whole = torch.zeros(M, 2 * N)
    apart = [whole[:, :N], whole[:, N:]]  # their rows alternate
    merge_update_group(group, apart, None, None, None, [1.0], backend=backend)
    for out in ([ones[1], torch.zeros(M, N)], [whole[:, :N], whole[:, 1 : N + 1]], [ones[2], torch.zeros(M, N)]):
        with pytest.raises(ValueError, match="out: expected memory of its own, got matrices . and . that overlap"):
            merge_update_group(group, out, None, None, None, [1.0], backend=backend)
        with pytest.raises(ValueError, match="out: expected memory of its own, got matrices . and . that overlap"):
            ties_update_group(group, out, [Keep()], [1.0], backend=backend)
    stack = torch.zeros(2, M, N)
    with pytest.raises(ValueError, match="overlaps an input"):
        merge_update_group(group, list(stack), stack, torch.ones(2, N, N), None, [1.0], backend=backend)


def test_overlap_is_exact() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(400):
        whole = np.zeros(int(rng.integers(40, 200)), np.float32)
        views = []
        for _ in range(2):
            m, n = rng.integers(1, 5, 2)
            stride = int(rng.integers(n, n + 12))
            start = int(rng.integers(0, max(1, whole.size - (m - 1) * stride - n)))
            if start + (m - 1) * stride + n <= whole.size:
                views.append(np.lib.stride_tricks.as_strided(whole[start:], (m, n), (4 * stride, 4)))
        if len(views) == 2:
            found = overlap(*views)
            assert found == overlap(*views[::-1]) == np.shares_memory(*views)
            seen.add(found)
    assert seen == {True, False}


def test_rows_that_are_no_multiple_of_an_entry_apart_are_refused(backend: str) -> None:
    records = np.zeros(3, dtype=[("row", "<f4", 5), ("end", "u1")])
    with pytest.raises(
        ValueError, match=r"tuned: expected memory aligned to 4 bytes, got .*strides of \[21, 4\] bytes"
    ):
        kernels.merge_update(np.zeros((3, 5), np.float32), None, records["row"], backend=backend)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
def test_what_has_no_matrix_in_memory_is_refused(backend: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def run(tuned: Any) -> None:
        kernels.residual_threshold(None, tuned, k=1, backend=backend)

    masked = np.ma.masked_array(np.ones((2, 3), np.float32), mask=np.eye(2, 3))
    with pytest.raises(TypeError, match="tuned: expected a matrix .*, got MaskedArray"):
        run(masked)
    ones = torch.ones(2, 3)
    for sparse in (ones.to_sparse(), ones.to_sparse_csr()):
        with pytest.raises(TypeError, match="tuned: expected a matrix .*, got a torch.sparse_.* tensor"):
            run(sparse)
    with pytest.raises(TypeError, match="tuned: expected a matrix .*, got a nested tensor"):
        run(torch.nested.nested_tensor([torch.ones(2), torch.ones(2)]))
    with pytest.raises(ValueError, match="tuned: expected numbers in memory, got a meta or fake Tensor"):
        run(torch.ones(2, 3, device="meta"))
    with pytest.raises(TypeError, match="tuned: expected numbers in memory, got Tensor .*: Cannot access data pointer"):
        torch.vmap(lambda x: run(x))(torch.ones(2, 2, 3))
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore")
        fake = torch.ones(2, 3)
        with pytest.raises(ValueError, match="tuned: expected numbers in memory, got a meta or fake FakeTensor"):
            run(fake)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_numpy_matrices_are_read_as_arrays(backend: str) -> None:
    x = np.matrix(np.ones((2, 3), np.float32))
    mask = kernels.topk_mask(x, 4, backend=backend)
    assert type(mask) is np.ndarray and mask.ravel().tolist() == [True] * 4 + [False] * 2


def test_checks_take_few_calls() -> None:
    """They run under the interpreter's lock, for every matrix of every expert, while other threads wait for it."""
    delta = np.arange(192, dtype=np.float32).reshape(16, 12) % 7
    out = np.zeros_like(delta)
    options: dict[str, Any] = {"backend": "cpu", "threads": 1}

    def reduce() -> None:
        svd = kernels.truncated_svd(None, delta, 3, **options)
        threshold = kernels.residual_threshold(None, delta, svd.left, svd.right, 20, **options)
        kernels.merge_update(out, None, delta, svd.left, svd.right, threshold, 0.3, **options)

    reduce()  # a backend is loaded once
    events: list[str] = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        reduce()
    finally:
        sys.setprofile(None)
    assert 50 < sum(event.endswith("call") for event in events) < 450
