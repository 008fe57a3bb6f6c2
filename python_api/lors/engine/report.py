"""What a merge did, in numbers."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class KindRow:
    """Sums over the tensors of one kind and all experts."""

    kind: str
    decomposed: bool
    tensors: int = 0
    entries: int = 0
    delta_energy: float = 0.0  # sum of delta^2
    low_energy: float = 0.0  # of L
    sparse_energy: float = 0.0  # of S

    @property
    def low_share(self) -> float:
        """Share of delta's energy kept by L."""
        return self.low_energy / self.delta_energy if self.delta_energy else 0.0

    @property
    def sparse_share(self) -> float:
        """Share of delta's energy kept by S."""
        return self.sparse_energy / self.delta_energy if self.delta_energy else 0.0


@dataclass
class MergeReport:
    """Result of `lors.merge`: what was merged, what was kept of it, and what it cost."""

    method: str
    backend: str
    out: str | None
    experts: list[str]
    tensors: int = 0
    decomposed: int = 0
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    peak_memory: int = 0  # bytes, of the whole process so far
    threads: int = 1
    kinds: list[KindRow] = field(default_factory=list)
    svd_methods: Counter[str] = field(default_factory=Counter)
    svd_passes: int = 0
    svd_worst: float = 0.0  # largest certified bound on the relative error of an L that is unique
    svd_not_unique: int = 0  # decompositions with equal singular values across the rank
    notices: list[str] = field(default_factory=list)

    @property
    def gb_per_second(self) -> float:
        """Bytes read and written over the time taken."""
        return (self.bytes_read + self.bytes_written) / self.seconds / 1e9 if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        data["svd_methods"] = dict(self.svd_methods)
        data["gb_per_second"] = self.gb_per_second
        for row, plain in zip(self.kinds, data["kinds"], strict=True):
            plain["low_share"], plain["sparse_share"] = row.low_share, row.sparse_share
        return data


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes.

    Linux tells it of this program alone; getrusage would count what the parent had when it forked.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # not Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
