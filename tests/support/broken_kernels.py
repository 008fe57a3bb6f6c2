"""Leaves out every barrier and every wait of the CUDA kernels in turn, and prints those that nobody missed.

Run by test_cuda_emulated.py, as a process of its own: `python broken_kernels.py MODULE`.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable

import torch

import lors_kernels as kernels
from cuda_emulation import ROOT, install
from lors_kernels import Keep, Threshold
from lors_kernels.group import MatrixGroup

SECONDS = 40  # for what takes one or two
WAIT = re.compile(r"__syncthreads(_or)?\(|__pipeline_wait_prior\(")


def operations() -> dict[str, list[Callable[[], object]]]:
    """Small calls of every kernel, by the file whose barriers they pass; each returns what has to stay the same."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 520, generator=generator)
    tuned = base + torch.randn(40, 520, generator=generator)
    odd = torch.randn(9, 67, generator=generator)
    x, y = (torch.randn(size, 8, generator=generator) for size in (520, 67))
    equal = torch.zeros(150, 8)
    equal[3::5] = 0.5

    def update() -> tuple[torch.Tensor, object]:
        out = base.clone()
        return out, kernels.merge_update(out, base, tuned, None, None, Threshold(0.5, 0, 0), 1.0, backend="cuda")

    def ties() -> object:
        return kernels.ties_update(base.clone(), base, [tuned], [Keep()], [1.0], backend="cuda")

    def many() -> tuple[torch.Tensor, object]:
        """More experts than a block keeps the sums of."""
        out, experts = odd.clone(), [odd + number for number in range(18)]
        for number, expert in enumerate(experts):
            expert[0, : number + 1] = float("inf")  # so many are counted
        rules = [Threshold(0.5 + number, 0, 0) for number in range(18)]
        return out, kernels.merge_update(out, odd, experts, None, None, rules, [1.0] * 18, backend="cuda")

    def many_ties() -> object:
        experts = [odd + number for number in range(18)]
        return kernels.ties_update(odd.clone(), odd, experts, [Keep()] * 18, [1.0] * 18, backend="cuda")

    def measure() -> tuple[torch.Tensor, ...]:
        from lors_kernels.backends.cuda import GROUPED

        return GROUPED.measure(MatrixGroup([base], [[tuned]]))

    def first_pass() -> object:
        from lors_kernels.backends.cuda import GROUPED

        return GROUPED.first_pass(MatrixGroup([base.half()], [[tuned.half()]]), x[None], side="right")

    def without_tensor_cores() -> object:
        os.environ["CUDA_EMULATION_SHARED"] = "0"
        try:
            return kernels.gram_apply(base, tuned, x, side="right", backend="cuda")
        finally:
            del os.environ["CUDA_EMULATION_SHARED"]

    def pairs() -> object:
        from lors_kernels.backends.cuda_module import eigh

        a = torch.randn(2, 36, 36, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        theta, vectors, error = eigh(a + a.mT)
        return theta, vectors, error

    def block() -> object:
        from lors_kernels.backends.cuda_module import orthonormalise

        draw = torch.Generator().manual_seed(2)
        basis = torch.linalg.qr(torch.randn(1, 200, 140, generator=draw))[0].contiguous()
        w, noise = torch.randn(1, 200, 8, generator=draw), torch.randn(200, 8, generator=draw, dtype=torch.float64)
        return orthonormalise(w, basis, torch.ones(1, dtype=torch.float64), noise, 1e-10)

    def step() -> object:
        from lors_kernels.backends.cuda_module import expand

        draw = torch.Generator().manual_seed(3)
        basis = torch.linalg.qr(torch.randn(1, 200, 152, generator=draw))[0].contiguous()
        t = torch.zeros(1, 144, 144, dtype=torch.float64)
        w, noise = torch.randn(1, 200, 8, generator=draw), torch.randn(200, 8, generator=draw, dtype=torch.float64)
        t.diagonal(dim1=1, dim2=2)[:] = torch.arange(144) % 7
        return expand(w, basis, 144, t, noise, 1e-10), basis, t

    def searched() -> object:
        from lors_kernels.backends import cuda

        before, cuda.SEARCHED = cuda.SEARCHED, 0
        try:
            found = [cuda.GROUPED.search(MatrixGroup(None, [[x]]), None, None, 3000) for x in (wide, steps)]
        finally:
            cuda.SEARCHED = before
        return found

    wide = torch.randn(40, 512, generator=generator)
    steps = (wide * 4).round()

    return {
        "orthonormalise.cu": [block, step],
        "eigh.cu": [pairs],
        "gram_apply.cu": [
            lambda: kernels.gram_apply(base, tuned, x, side="right", backend="cuda"),
            lambda: kernels.gram_apply(None, odd, y, backend="cuda"),
            lambda: kernels.gram_apply(base.half(), tuned.half(), x, backend="cuda"),
            lambda: kernels.gram_apply(base.half(), tuned.half(), x[:40], side="left", backend="cuda"),
            first_pass,
            without_tensor_cores,
        ],
        "residual_threshold.cu": [
            lambda: kernels.residual_threshold(base, tuned, k=4000, backend="cuda"),
            lambda: kernels.residual_threshold(None, equal, k=239, backend="cuda"),
            searched,
        ],
        "merge_update.cu": [many],
        "ties_update.cu": [many_ties],
        "tiles.cuh": [update, ties, measure],
    }


def outcome(call: Callable[[], object]) -> str:
    try:
        return repr(call())
    except RuntimeError as error:
        return f"failed: {error}"


def differs(calls: list[Callable[[], object]], right: list[str], seed: int) -> bool:
    os.environ["CUDA_EMULATION_SEED"] = str(seed)
    return any(outcome(call) != text for call, text in zip(calls, right, strict=True))


def differs_or_dies(calls: list[Callable[[], object]], right: list[str], seed: int) -> bool:
    """In a process of its own: what is read too early may be an address, or the end of a loop."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] != 0
    signal.alarm(SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os._exit(int(differs(calls, right, seed)))


def main(module: str) -> None:
    install(module)
    torch.set_printoptions(threshold=sys.maxsize, precision=9)
    operation = operations()
    right = {file: [outcome(call) for call in calls] for file, calls in operation.items()}
    assert not any("failed" in text or "nan" in text for texts in right.values() for text in texts), "broken already"
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu*")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if WAIT.search(line):
                os.environ["CUDA_EMULATION_SKIP"] = f"{path.name}:{number}"
                missed = any(differs_or_dies(operation[path.name], right[path.name], seed) for seed in range(8))
                print(f"{path.name}:{number} {'missed' if missed else 'NOT MISSED'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
