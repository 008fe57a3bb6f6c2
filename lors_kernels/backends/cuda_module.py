"""The compiled CUDA module, and what the decomposition's driver takes from it: small dense work on tensors of its device.

Apart from the backend, which stands on that driver.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

NAME = "cuda"
DEVICES = ("cuda",)


@cache
def library() -> ModuleType:
    return import_module("lors_kernels._cuda")


def stream(device: Any) -> tuple[int, int]:
    """Number of the device, and its current stream."""
    import torch

    return device.index or 0, torch.cuda.current_stream(device).cuda_stream


def runs_on(device: Any) -> bool:
    """Whether this backend is there and runs on the device."""
    from ..dispatch import availability

    return device.type in DEVICES and availability(NAME).ok


def takes_eigh(a: Any) -> bool:
    """Whether `eigh` below takes a [A, n, n]: of a size that fits a block's shared memory, rows contiguous."""
    import torch

    if not runs_on(a.device) or a.dtype != torch.float64 or a.numel() == 0 or a.stride(2) != 1:
        return False
    return bool(a.shape[2] <= library().eigh_max_size(stream(a.device)[0]))


def eigh(a: Any) -> tuple[Any, Any, Any]:
    """theta [A, n] smallest first, vectors [A, n, n] in columns, and [A] the largest entry of |V.T V - 1| and of
    |A V - V theta| / |A|."""
    theta, vectors, error = a.new_empty(a.shape[:2]), a.new_empty(a.shape), a.new_empty(a.shape[0])
    places = (theta.data_ptr(), vectors.data_ptr(), error.data_ptr())
    library().eigh(stream(a.device), a.data_ptr(), a.stride(1), a.stride(0), a.shape[0], a.shape[2], *places)
    return theta, vectors, error


def takes_orthonormalise(w: Any, basis: Any) -> bool:
    """Whether `orthonormalise` below takes w [A, n, b] and basis [A, n, s] or None."""
    import torch

    if not runs_on(w.device) or w.dtype != torch.float32 or w.shape[2] != 8 or w.numel() == 0:
        return False
    if w.shape[1] > library().orthonormalise_max_rows(stream(w.device)[0]):
        return False
    if basis is None:
        return True
    whole = basis.stride(1) % 4 == basis.stride(0) % 4 == basis.shape[2] % 4 == basis.data_ptr() % 16 == 0
    return bool(whole and basis.stride(2) == 1)


def orthonormalise(w: Any, basis: Any, scale: Any, noise: Any, level: float) -> tuple[Any, Any]:
    """As `truncated_svd.orthonormalise`, in one launch."""
    import torch

    w, noise, scale = w.contiguous(), noise.contiguous(), scale.contiguous()
    q, below = torch.empty_like(w), scale.new_empty((len(w), w.shape[2], w.shape[2]))
    columns = (0, 0, 0, 0)
    if basis is not None:
        columns = (basis.data_ptr(), basis.shape[2], basis.stride(1), basis.stride(0))
    library().orthonormalise(
        stream(w.device), w.data_ptr(), columns, len(w), w.shape[1], noise.data_ptr(), scale.data_ptr(), level,
        q.data_ptr(), below.data_ptr(),
    )  # fmt: skip
    return q, below


def expand(w: Any, basis: Any, columns: int, t: Any, noise: Any, level: float) -> Any:
    """One step of `truncated_svd.Krylov`, after w [A, n, 8] = G times the newest 8 of the basis's columns: writes their rows
    and columns of t [A, room, room], and the next block behind them in basis [A, n, room + 8]; returns `below`."""
    w, noise = w.contiguous(), noise.contiguous()
    below = t.new_empty((len(w), w.shape[2], w.shape[2]))
    place = (basis.data_ptr(), columns, basis.stride(1), basis.stride(0))
    library().expand(
        stream(w.device), w.data_ptr(), place, len(w), w.shape[1], noise.data_ptr(), level, t.data_ptr(), t.shape[1],
        below.data_ptr(),
    )  # fmt: skip
    return below
