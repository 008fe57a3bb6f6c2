"""Random numbers without a state, as csrc/common/counter_random.h has them: number i of a stream follows from its key and i.

This is what defines them. Kernels draw for themselves; what has no kernel (della_linear), the reference and the checks draw here.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from .types import ALWAYS


def random_bits(key: int, start: int, count: int) -> np.ndarray:
    """Numbers start .. start + count - 1 of a stream: SplitMix64 entered at any place, its upper 32 bits, as uint64."""
    z = np.uint64(key) + np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) >> np.uint64(32)  # type: ignore[no-any-return]


def random_bits_on(device: Any, key: int, start: int, count: int) -> Any:
    """The same numbers as an int64 tensor, computed on a device. torch's int64 wraps around as uint64 does."""
    import torch

    def signed(x: int) -> int:
        return x - (1 << 64) if x >> 63 else x

    z = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device) * signed(0x9E3779B97F4A7C15)
    z += signed(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * signed(factor)
    return z >> 32 & 0xFFFFFFFF


def random_key(*parts: object) -> int:
    """The 64-bit key of a random stream, from what names it: (seed, expert, tensor) for instance."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def keep_limit(probability: float) -> int:
    """`Keep.limit` of a probability: floor(p * 2^32)."""
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: expected 0 to 1, got {probability}")
    return int(probability * ALWAYS)
