"""What this machine does at most, measured in a second: the denominators of `lors bench`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 0.1  # of each measurement
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Peaks:
    multiply: float  # float32 operations per second, multiply-adds counted as two
    bfloat16: float  # the same by dot products of bfloat16 (float16 on a GPU); 0 where the processor has none
    read: dict[int, float]  # size of each level in bytes, smallest first -> bytes read per second from it

    def bandwidth(self, size: int) -> float:
        """Of the smallest level that holds `size` bytes, or of the last."""
        return next((rate for level, rate in self.read.items() if size <= level), list(self.read.values())[-1])

    def floor(self, nbytes: int, flops: int, size: int) -> float:
        """Seconds below which nothing that moves and computes so much can be, with float32 arithmetic."""
        return max(nbytes / self.bandwidth(size), flops / self.multiply)


def cache_sizes() -> dict[str, int]:
    """Bytes of L1d, L2 and L3 that core 0 sees; empty where the system does not say (only Linux does here)."""
    sizes: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, text = ((index / entry).read_text().strip() for entry in ("type", "level", "size"))
        if kind != "Instruction":
            sizes["L1d" if level == "1" else f"L{level}"] = int(text[:-1]) * _UNITS[text[-1]]
    return sizes


def cpu_peaks(threads: int) -> Peaks:
    """Of `threads` cores, by the CPU backend's own build. Levels up to the second are private to a core: their sizes count
    once per thread. They are read at three quarters of their size, memory at four times the last cache."""
    from ..backends.cpu import library

    native = library()
    caches = list(cache_sizes().values()) or [32 << 10, 1 << 20, 32 << 20]
    sizes = [size * (threads if level < 2 else 1) for level, size in enumerate(caches)]
    read = {size: native.read_rate(size * 3 // 4, threads, SECONDS) for size in sizes}
    memory = min(4 * sizes[-1], 1 << 30)
    read[1 << 62] = native.read_rate(memory, threads, SECONDS)
    return Peaks(native.multiply_rate(threads, SECONDS), native.bfloat16_rate(threads, SECONDS), read)


def device_peaks(device: str) -> Peaks:
    """Of a GPU: products of torch and a copy between buffers of 1 GB, whose reads and writes both count."""
    import torch

    def rate(work: float, call: Callable[[], Any]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(3):
            call()
        begin.record()
        for _ in range(10):
            call()
        end.record()
        end.synchronize()
        return 10 * work / (begin.elapsed_time(end) / 1e3)

    side = 4096
    x = torch.randn(side, side, device=device)
    half = x.half()
    source = torch.empty(1 << 28, device=device)
    target = torch.empty_like(source)
    with torch.cuda.device(device):
        return Peaks(
            rate(2.0 * side**3, lambda: x @ x),
            rate(2.0 * side**3, lambda: half @ half),
            {1 << 62: rate(2.0 * source.nbytes, lambda: target.copy_(source))},
        )
