"""Tensors as the backends see them: checked once, at the public function, with the value in the message.

Arguments are `torch.Tensor` or `numpy.ndarray` (bfloat16 as `ml_dtypes.bfloat16`). torch is imported only when a caller
already brought a tensor, or when a backend that is written in torch runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import torch

Array: TypeAlias = "np.ndarray | torch.Tensor"

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = ("float32", "float16", "bfloat16")  # the order is the DType enum of csrc/lors/views.h


def is_torch(x: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def dtype_name(x: Array) -> str:
    return str(x.dtype).removeprefix("torch.")


def device_of(x: Array) -> str:
    """The device type, `"cpu"` for a numpy array."""
    return x.device.type if is_torch(x) else "cpu"  # type: ignore[union-attr]


def describe(x: object) -> str:
    if is_torch(x) or isinstance(x, np.ndarray):
        return f"{type(x).__name__} of shape {list(x.shape)} and dtype {dtype_name(x)}"  # type: ignore[attr-defined]
    return f"{type(x).__name__} {x!r}"[:80]


def strides_of(x: Array) -> tuple[int, ...]:
    """Strides in elements."""
    if is_torch(x):
        return tuple(x.stride())  # type: ignore[union-attr]
    return tuple(s // x.itemsize for s in x.strides)  # type: ignore[union-attr]


def address_of(x: Array) -> int:
    return x.data_ptr() if is_torch(x) else x.ctypes.data  # type: ignore[union-attr]


def check_matrix(
    x: Any, name: str, *, shape: Sequence[int | None] = (None, None), dtypes: Sequence[str] = FLOATS
) -> None:
    """Raises unless `x` is a matrix of the given shape (None: any size) whose rows are contiguous."""
    wanted = f"a matrix {['any' if s is None else s for s in shape]} of dtype {' or '.join(dtypes)}"
    if not (is_torch(x) or isinstance(x, np.ndarray)):
        raise TypeError(f"{name}: expected {wanted}, got {describe(x)}")
    if dtype_name(x) not in dtypes:
        raise TypeError(f"{name}: expected {wanted}, got {describe(x)}")
    if x.ndim != 2 or any(want is not None and want != got for want, got in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{name}: expected {wanted}, got {describe(x)}")
    if x.shape[1] >= 2**31:
        raise ValueError(f"{name}: expected fewer than 2**31 columns, got {describe(x)}")
    row, column = strides_of(x)
    if x.size != 0 if isinstance(x, np.ndarray) else x.numel() != 0:
        if column != 1 and x.shape[1] > 1 or row < x.shape[1] and x.shape[0] > 1:
            raise ValueError(f"{name}: expected contiguous rows, got strides {(row, column)} for {describe(x)}")
        itemsize = x.itemsize if isinstance(x, np.ndarray) else x.element_size()
        if address_of(x) % itemsize:
            raise ValueError(f"{name}: expected memory aligned to {itemsize} bytes, got address {address_of(x):#x}")


def check_pair(base: Any, tuned: Any) -> tuple[int, int]:
    """Checks base and tuned of one matrix (base None: zeros) and returns (m, n)."""
    check_matrix(tuned, "tuned")
    if base is not None:
        check_matrix(base, "base", shape=tuned.shape)
        check_same_place(tuned, base, "base")
    return int(tuned.shape[0]), int(tuned.shape[1])


def check_same_place(like: Array, x: Array, name: str) -> None:
    if is_torch(like) != is_torch(x):
        raise TypeError(f"{name}: expected a {type(like).__name__} like tuned, got {describe(x)}")
    if is_torch(x) and x.device != like.device:  # type: ignore[union-attr]
        raise ValueError(f"{name}: expected device {like.device} like tuned, got {x.device}")  # type: ignore[union-attr]


def check_factors(left: Any, right: Any, tuned: Array) -> int:
    """Checks the low-rank factors (both None: rank 0) and returns their rank."""
    if (left is None) != (right is None):
        raise ValueError("left, right: expected both or neither, got one")
    if left is None:
        return 0
    check_matrix(left, "left", shape=(tuned.shape[0], None), dtypes=("float32",))
    check_matrix(right, "right", shape=(tuned.shape[1], left.shape[1]), dtypes=("float32",))
    check_same_place(tuned, left, "left")
    check_same_place(tuned, right, "right")
    return int(left.shape[1])


def new(like: Array, shape: tuple[int, ...], *, zero: bool = False) -> Any:
    """A float32 array of the kind and on the device of `like`."""
    if is_torch(like):
        import torch

        make = torch.zeros if zero else torch.empty
        return make(shape, dtype=torch.float32, device=like.device)  # type: ignore[union-attr]
    return (np.zeros if zero else np.empty)(shape, dtype=np.float32)


def contiguous(x: Array) -> Any:
    return x.contiguous() if is_torch(x) else np.ascontiguousarray(x)  # type: ignore[union-attr]


def to_torch(x: Any) -> Any:
    """The same memory as a torch tensor (a copy of read-only or reversed memory, which torch has not); None stays None."""
    if x is None or is_torch(x):
        return x
    import torch

    if not x.flags.writeable or min(x.strides, default=0) < 0:
        x = x.copy()
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def like_kind(like: Array, x: Any) -> Any:
    """Torch result -> the kind of `like`."""
    return x if is_torch(like) else x.numpy()
