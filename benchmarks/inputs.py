"""What the benchmarks of the kernel operations share: shapes, input rings, counted bytes, rounds.

A kernel that is called again on the same small matrix finds it in the cache, which no merge ever does at first touch.
"cold" therefore walks through a ring of matrix pairs four times as large as the last cache; "warm" repeats one pair,
which is what the passes of a decomposition after the first one see.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lors_kernels.testing.peaks import cache_sizes

from .generate import Spec, delta_tensor

RANK, DENSITY, LAMBDA, EXPERTS = 7, 0.2, 0.2, 5

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Inputs:
    """base [m, n], `tuned` experts [m, n] in the checkpoint's dtype; deltas as fine-tuning leaves them."""

    base: Tensor
    tuned: list[Tensor]

    @property
    def delta(self) -> Tensor:
        return self.tuned[0].float() - self.base.float()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.base, *self.tuned))


@lru_cache(maxsize=1)  # the parameters that change fastest, rivals, share their inputs
def make_inputs(shape: tuple[int, int], dtype: str, experts: int = 1, deltas: str = "powerlaw") -> Inputs:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.03
    spec = Spec("tiny", deltas=deltas)
    made = [torch.from_numpy(delta_tensor(spec, number, "fc1.weight", shape)) for number in range(1, experts + 1)]
    return Inputs(base.to(DTYPES[dtype]), [(base + delta).to(DTYPES[dtype]) for delta in made])


def copies(inputs: Inputs, cold: bool) -> list[Inputs]:
    """One pair, or as many copies as it takes to leave the last cache (at most 1 GB)."""
    if not cold:
        return [inputs]
    last = max(cache_sizes().values(), default=32 << 20)
    count = min(-(-4 * last // inputs.nbytes), max(2, (1 << 30) // inputs.nbytes))
    return [inputs] + [Inputs(inputs.base.clone(), [each.clone() for each in inputs.tuned]) for _ in range(count - 1)]


@lru_cache(maxsize=EXPERTS)
def factors(inputs: Inputs, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """left [m, rank], right [n, rank] of the delta of the first expert, from LAPACK."""
    left, sigma, right = torch.linalg.svd(inputs.delta, full_matrices=False)
    return (left[:, :rank] * sigma[:rank]).contiguous(), right[:rank].T.contiguous()


def time_call(
    benchmark: Any, ring: list[Inputs], call: Callable[[Inputs], object], *, nbytes: int, rounds: int, **facts: object
) -> None:
    """Run `call` once per round, each time on the next inputs of the ring; file the counted bytes beside the time."""
    benchmark.extra_info.update(shape=list(ring[0].base.shape), bytes=nbytes, **facts)
    following = itertools.cycle(ring)

    def setup() -> tuple[tuple[Inputs], dict[str, Any]]:
        return (next(following),), {}

    benchmark.pedantic(call, setup=setup, rounds=rounds, warmup_rounds=min(len(ring), 3), iterations=1)


def close(found: Tensor, truth: Tensor, naive: Tensor, what: str) -> None:
    """The found result is as near to the float64 truth as plain float32 torch is (times 4, for another sum order)."""
    scale = truth.norm()
    error, allowed = (found.double() - truth).norm() / scale, 4 * (naive.double() - truth).norm() / scale + 1e-7
    assert error <= allowed, f"{what}: expected a relative error of at most {allowed:.1e}, got {error:.1e}"
