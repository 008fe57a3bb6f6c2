"""One table of matrices feeds the tests, the benchmarks and `lors validate`.

Real Whisper shapes by name, and inputs that have broken selection and SVD code elsewhere. Every case is a function of its
seed alone, so a failure can be repeated from its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import ml_dtypes
import numpy as np

from .spectra import KINDS, hard_case

Matrix: TypeAlias = "np.ndarray"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# rows, columns of the decomposed matrices
SHAPES = {
    "tiny-attn": (384, 384),
    "tiny-fc1": (1536, 384),
    "small-attn": (768, 768),
    "small-fc1": (3072, 768),
    "small-fc2": (768, 3072),
    "large-attn": (1280, 1280),
    "large-fc1": (5120, 1280),
    "large-fc2": (1280, 5120),
}


@dataclass(frozen=True)
class Case:
    """delta by its spectrum or its bits; `matrices()` gives (base, tuned) in numpy."""

    name: str
    build: Callable[[np.random.Generator], np.ndarray]  # the wanted delta, float32
    rank: int = 7
    dtypes: tuple[str, str] = ("float32", "float32")  # of base and tuned
    exact: bool = False  # base is zero, so that delta has the very bits that were built
    large: bool = False  # seconds rather than milliseconds on the reference
    hard: bool = False  # a spectrum that asks something of decompositions alone

    def matrices(self, seed: int = 0) -> tuple[Matrix, Matrix]:
        return _matrices(self.name, seed)


@cache
def _matrices(name: str, seed: int) -> tuple[Matrix, Matrix]:
    case = by_name(name)
    rng = np.random.default_rng([seed, *name.encode()])
    delta = case.build(rng).astype(np.float32)
    scale = 0.0 if case.exact else 0.05
    base = (rng.standard_normal(delta.shape) * scale).astype(DTYPES[case.dtypes[0]])
    tuned = (base.astype(np.float32) + delta).astype(DTYPES[case.dtypes[1]])
    for array in (base, tuned):
        array.setflags(write=False)
    return base, tuned


def with_spectrum(
    m: int, n: int, sigma: Callable[[np.ndarray], np.ndarray], scale: float = 1e-2
) -> Callable[[np.random.Generator], np.ndarray]:
    """A matrix with random singular vectors and sigma(i), i = 1..min(m, n)."""

    def build(rng: np.random.Generator) -> np.ndarray:
        k = min(m, n)
        u = np.linalg.qr(rng.standard_normal((m, k)))[0]
        v = np.linalg.qr(rng.standard_normal((n, k)))[0]
        values = np.broadcast_to(np.asarray(sigma(np.arange(1, k + 1, dtype=np.float64)), dtype=np.float64), (k,))
        return (u * values) @ v.T * scale

    return build


def gaussian(m: int, n: int, scale: float = 1e-3) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.standard_normal((m, n)) * scale


def constant(m: int, n: int, value: float) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: np.full((m, n), value)


def constant_bits(x: np.ndarray) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: x


def few_values(m: int, n: int, values: tuple[float, ...]) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.choice(np.array(values, dtype=np.float32), (m, n))


def bit_ladder(m: int, n: int) -> Callable[[np.random.Generator], np.ndarray]:
    """Consecutive floats from 1.0 upwards in random order: all leading bits equal."""

    def build(rng: np.random.Generator) -> np.ndarray:
        bits = (np.uint32(0x3F800000) + np.arange(m * n, dtype=np.uint32)).reshape(m, n)
        return rng.permuted(bits, axis=None).view(np.float32) * np.where(rng.random((m, n)) < 0.5, -1, 1)

    return build


def denormals(m: int, n: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.integers(0, 2000, (m, n)).astype(np.uint32).view(np.float32)


def outlier(m: int, n: int) -> Callable[[np.random.Generator], np.ndarray]:
    def build(rng: np.random.Generator) -> np.ndarray:
        x = rng.standard_normal((m, n)) * 1e-3
        x[m // 2, n // 3] = 1e4
        return x

    return build


def signed_zeros(m: int, n: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: np.where(rng.random((m, n)) < 0.5, -0.0, 0.0) + (rng.random((m, n)) < 0.1)


def _power(exponent: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda i: i**-exponent


def _spikes(i: np.ndarray) -> np.ndarray:
    return np.where(i <= 10, 1.25**-i, 0.02)  # type: ignore[no-any-return]


def _clustered(i: np.ndarray) -> np.ndarray:
    return np.where(i <= 3, 4.0 - i, np.where(i <= 12, 0.5 * (1 - 1e-4 * i), 0.3 / i))  # type: ignore[no-any-return]


def _tight(i: np.ndarray) -> np.ndarray:
    return np.where(i <= 7, 1.0 / i, (1.0 / 7) * (1 - 1e-3) * (8.0 / (i + 1)) ** 0.02)  # type: ignore[no-any-return]


def _low_rank(i: np.ndarray) -> np.ndarray:
    return np.where(i <= 4, 1.0 / i, 0.0)  # type: ignore[no-any-return]


def _table() -> tuple[Case, ...]:
    cases = [
        # spectra
        Case("power-0.5", with_spectrum(384, 384, _power(0.5))),
        Case("power-0.3", with_spectrum(384, 384, _power(0.3))),
        Case("spikes", with_spectrum(384, 256, _spikes)),
        Case("flat-noise", gaussian(256, 256)),
        Case("flat-exact", with_spectrum(192, 160, np.ones_like)),
        Case("clustered", with_spectrum(192, 224, _clustered)),
        Case("tight-gap", with_spectrum(224, 192, _tight)),
        Case("rank-4", with_spectrum(160, 192, _low_rank)),
        Case("rank-4-exact", lambda rng: rng.integers(-3, 4, (96, 4)) @ rng.integers(-3, 4, (4, 64)), exact=True),
        Case("zero", constant(64, 48, 0.0), exact=True),
        Case("identity", lambda rng: np.eye(100, 80), exact=True),
        Case("huge-and-tiny", with_spectrum(128, 128, lambda i: 10.0 ** (3 - i)), rank=5),
        # shapes
        Case("1x1", gaussian(1, 1), rank=1),
        Case("1xn", gaussian(1, 777), rank=1),
        Case("mx1", gaussian(555, 1), rank=1),
        Case("2x3", gaussian(2, 3), rank=2),
        Case("odd", with_spectrum(131, 67, _power(0.5))),
        Case("wide", with_spectrum(48, 1031, _power(0.5))),
        Case("tall", with_spectrum(1031, 48, _power(0.5))),
        Case("rank-1", with_spectrum(96, 128, _power(0.5)), rank=1),
        Case("rank-full", with_spectrum(24, 40, _power(0.5)), rank=24),
        Case("rank-40", with_spectrum(256, 192, _power(0.7)), rank=40),
        # bits
        Case("bit-ladder", bit_ladder(96, 160), exact=True),
        Case("all-equal", constant(70, 90, 0.125), rank=1, exact=True),
        Case("few-values", few_values(80, 100, (-2.0, -1.0, 0.0, 1.0, 2.0)), exact=True),
        Case("denormals", denormals(64, 96), exact=True),
        Case("outlier", outlier(96, 96), exact=True),
        Case("signed-zeros", signed_zeros(64, 80), exact=True),
        # dtypes
        Case("fp16", with_spectrum(192, 128, _power(0.5)), dtypes=("float16", "float16")),
        Case("bf16", with_spectrum(192, 128, _power(0.5)), dtypes=("bfloat16", "bfloat16")),
        Case("fp32-fp16", with_spectrum(128, 192, _power(0.5)), dtypes=("float32", "float16")),
        Case("fp16-bf16", with_spectrum(128, 130, _power(0.5)), dtypes=("float16", "bfloat16")),
        Case("bf16-fp32", with_spectrum(67, 129, _power(0.5)), dtypes=("bfloat16", "float32")),
        # real shapes
        *(
            Case(f"{name}-power", with_spectrum(*shape, _power(0.5)), large=True)
            for name, shape in SHAPES.items()
            if "small" in name
        ),
        Case("small-attn-flat", gaussian(768, 768), large=True),
        Case("small-fc1-flat", gaussian(3072, 768), large=True),
        Case("tiny-fc1-spikes", with_spectrum(1536, 384, _spikes), large=True),
    ]
    return tuple(cases)


CASES = _table()


@cache
def hard_spectra() -> tuple[Case, ...]:
    """One matrix of each class that has fooled a solver, large enough for the batched driver to iterate; and more copies of
    each value than its blocks are wide, for those who would not ask whether there are more.
    """
    cases = (hard_case(kind, seed=0, smallest=200, largest=260) for kind in KINDS)
    block = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    copies = Case(
        "hard many copies", constant_bits(np.kron(np.eye(40, dtype=np.float32), block)), 18, exact=True, hard=True
    )
    return (*(Case(f"hard {c.kind}", constant_bits(c.delta), c.rank, exact=True, hard=True) for c in cases), copies)


@cache
def by_name(name: str) -> Case:
    return next(case for case in (*CASES, *(hard_spectra() if name.startswith("hard ") else ())) if case.name == name)


def interesting_k(numel: int) -> list[int]:
    """Counts at the edges and in the middle."""
    return sorted({0, 1, min(2, numel), numel // 100, numel // 5, numel // 2, max(0, numel - 1), numel})
