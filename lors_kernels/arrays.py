"""Tensors as the backends see them: made plain and checked once, at the public function, with the value in the message.

Arguments are `torch.Tensor` or `numpy.ndarray` (bfloat16 as `ml_dtypes.bfloat16`). torch is imported only when a caller
already brought a tensor, or when a backend that is written in torch runs. Nothing here is differentiated: what an
operation reads is detached, and an output that autograd records is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import torch

Array: TypeAlias = "np.ndarray | torch.Tensor"

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = ("float32", "float16", "bfloat16")  # the order is the DType enum of csrc/common/views.h


def is_torch(x: object) -> bool:
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)  # not there yet while another thread imports torch
    return tensor is not None and isinstance(x, tensor)


def is_numpy(x: object) -> bool:
    """Whether it is an array all of whose entries count. numpy.ma, slow to import, is asked about subclasses alone."""
    return type(x) is np.ndarray or isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray)


def dtype_name(x: Array) -> str:
    return _name(x.dtype)


@cache
def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def device_of(x: Array) -> str:
    """The device type, `"cpu"` for a numpy array."""
    return "cpu" if isinstance(x, np.ndarray) else x.device.type


def describe(x: object) -> str:
    if is_torch(x) or isinstance(x, np.ndarray):
        return f"{type(x).__name__} of shape {list(x.shape)} and dtype {dtype_name(x)}"  # type: ignore[attr-defined]
    return f"{type(x).__name__} {x!r}"[:80]


def strides_of(x: Array) -> tuple[int, ...]:
    """Strides in elements."""
    if isinstance(x, np.ndarray):
        return tuple([s // x.itemsize for s in x.strides])
    return tuple(x.stride())


def byte_strides(x: Array) -> tuple[int, ...]:
    return x.strides if isinstance(x, np.ndarray) else tuple(s * x.element_size() for s in x.stride())


def address_of(x: Array) -> int:
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data_ptr()


def item_size(x: Array) -> int:
    return x.itemsize if isinstance(x, np.ndarray) else x.element_size()


def plain(x: Any) -> Any:
    """What an operation reads of an argument: its very numbers, without a subclass, autograd or torch's lazy negation.

    A tensor with the negation bit set holds the negative of what its memory says, so its numbers are written out. What is
    no array is left to `check_matrix`.
    """
    if is_numpy(x):
        return np.asarray(x)
    if is_torch(x):
        x = x.detach()
        return x.resolve_neg() if x.is_neg() else x
    return x


def check_matrix(
    x: Any, name: str, *, shape: Sequence[int | None] = (None, None), dtypes: Sequence[str] = FLOATS
) -> None:
    """Raises unless `x` is a matrix of the given shape (None: any size) whose rows are contiguous in memory it can read."""
    if not is_numpy(x):
        if not is_torch(x):
            raise TypeError(f"{name}: expected {_matrix(shape, dtypes)}, got {describe(x)}")
        if x.is_nested or x.layout != sys.modules["torch"].strided:
            got = "nested" if x.is_nested else x.layout
            raise TypeError(f"{name}: expected {_matrix(shape, dtypes)}, got a {got} tensor")
    if dtype_name(x) not in dtypes:
        raise TypeError(f"{name}: expected {_matrix(shape, dtypes)}, got {describe(x)}")
    if x.ndim != 2 or shape[0] not in (None, x.shape[0]) or shape[1] not in (None, x.shape[1]):
        raise ValueError(f"{name}: expected {_matrix(shape, dtypes)}, got {describe(x)}")
    if x.shape[1] >= 2**31:
        raise ValueError(f"{name}: expected fewer than 2**31 columns, got {describe(x)}")
    if 0 not in x.shape:
        _check_memory(x, name)


def _matrix(shape: Sequence[int | None], dtypes: Sequence[str]) -> str:
    return f"a matrix {['any' if s is None else s for s in shape]} of dtype {' or '.join(dtypes)}"


def _check_memory(x: Array, name: str) -> None:
    if isinstance(x, np.ndarray) and x.flags.c_contiguous and x.flags.aligned:
        return  # as nearly always: numpy is slow to say strides, and an address
    row, column = strides_of(x)
    if column != 1 and x.shape[1] > 1 or row < x.shape[1] and x.shape[0] > 1:
        raise ValueError(f"{name}: expected contiguous rows, got strides {(row, column)} for {describe(x)}")
    if isinstance(x, np.ndarray) and x.flags.aligned:
        return  # numpy is asked for no address: it is slow to say it
    try:
        address = address_of(x)
    except RuntimeError as error:  # a tensor of torch.vmap, which stands for several
        raise TypeError(f"{name}: expected numbers in memory, got {describe(x)}: {error}".splitlines()[0]) from None
    if address == 0:
        raise ValueError(f"{name}: expected numbers in memory, got a meta or fake {describe(x)}")
    if is_torch(x) and x.is_neg():  # type: ignore[union-attr]
        raise ValueError(f"{name}: expected numbers in memory, got a lazily negated {describe(x)}: call resolve_neg()")
    size, strides = item_size(x), byte_strides(x)
    if address % size or any(s % size for s, count in zip(strides, x.shape, strict=True) if count > 1):
        got = f"address {address:#x} and strides of {list(strides)} bytes"
        raise ValueError(f"{name}: expected memory aligned to {size} bytes, got {got}")


def check_pair(base: Any, tuned: Any) -> tuple[int, int]:
    """Checks base and tuned of one matrix (base None: zeros) and returns (m, n)."""
    check_matrix(tuned, "tuned")
    if base is not None:
        check_matrix(base, "base", shape=tuned.shape)
        check_same_place(tuned, base, "base")
    return int(tuned.shape[0]), int(tuned.shape[1])


def check_same_place(like: Array, x: Array, name: str) -> None:
    if isinstance(like, np.ndarray) and isinstance(x, np.ndarray):
        return
    if is_torch(like) != is_torch(x):
        raise TypeError(f"{name}: expected a {type(like).__name__} like tuned, got {describe(x)}")
    if x.device != like.device:  # type: ignore[union-attr]
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


def check_out(
    out: Any,
    like: Array,
    *,
    entrywise: Sequence[Array | None] = (),
    others: Sequence[Array | None] = (),
    name: str = "out",
    dtypes: Sequence[str] = FLOATS,
) -> Any:
    """The matrix that is about to be written, plain, of the shape and in the place of `like`; the last of an operation's checks.

    Raises unless it is the caller's to write and nothing reads it elsewhere: `entrywise` inputs, of which entry [i, j] is
    read for entry [i, j] alone, may be the very same matrix, and `others` share no memory with it. Autograd is told of the
    write, as torch's own operations in place do: a backward pass that needs the old numbers fails instead of using the new.
    """
    written = plain(out)
    _check_writable(out, name)
    check_matrix(written, name, shape=like.shape, dtypes=dtypes)
    check_same_place(like, written, name)
    near = [x for x in entrywise if x is not None and _is_near(written, x)]
    inputs = [x for x in near if _geometry(x) != _geometry(written)]
    if any(overlap(written, x) for x in (*inputs, *others) if x is not None):
        raise ValueError(f"{name}: expected memory of its own, got {describe(out)} that overlaps an input")
    if is_torch(out):
        import torch

        torch.autograd.graph.increment_version(out)
    return written


def _check_writable(out: Any, name: str) -> None:
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError(f"{name}: expected memory that may be written, got a read-only {describe(out)}")
    if isinstance(out, np.ndarray) or not is_torch(out):
        return
    import torch

    if out.is_neg():
        raise ValueError(f"{name}: expected a tensor without the lazy negation bit, got {describe(out)}: pass a copy")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor without gradient, or torch.no_grad(), got {describe(out)} that requires one"
        )


def _geometry(x: Array) -> tuple[object, ...]:
    return address_of(x), dtype_name(x), tuple(x.shape), byte_strides(x)[0] if x.shape[0] > 1 else None


def overlap(a: Array, b: Array) -> bool:
    """Whether two checked matrices have a byte in common."""
    if 0 in a.shape or 0 in b.shape or not _is_near(a, b):
        return False
    (a_rows, a_width), (b_rows, b_width) = _rows(a), _rows(b)
    before = np.searchsorted(b_rows, a_rows + a_width) - 1  # the last row of b that begins before a row of a ends
    return bool(((before >= 0) & (b_rows[before] + b_width > a_rows)).any())


def _is_near(a: Array, b: Array) -> bool:
    """Whether a byte of one lies between bytes of the other."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.may_share_memory(a, b)
    (a_start, a_end), (b_start, b_end) = span(a), span(b)
    return a_start < b_end and b_start < a_end


def span(x: Array) -> tuple[int, int]:
    """The first byte of a checked matrix, and the first behind its last."""
    start = address_of(x)
    return start, start + byte_strides(x)[0] * (x.shape[0] - 1) + x.shape[1] * item_size(x)


def _rows(x: Array) -> tuple[np.ndarray, int]:
    """Where the rows of a checked matrix begin, and their width, in bytes."""
    step = byte_strides(x)[0] if x.shape[0] > 1 else 0
    return address_of(x) + step * np.arange(x.shape[0]), x.shape[1] * item_size(x)


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

    x = x.squeeze().reshape(x.shape)  # one row or column has any stride: torch takes no negative ones
    if not x.flags.writeable or min(x.strides, default=0) < 0:
        x = x.copy()
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def on_numpy(run: Callable[..., Any]) -> Callable[..., Any]:
    """What is written in torch, for numpy arrays: they go in as tensors of the same memory, tensors come out as arrays."""

    def adapted(*arguments: Any, **options: Any) -> Any:
        return _as_numpy(run(*map(_as_torch, arguments), **options))

    return adapted


def _as_torch(x: Any) -> Any:
    """The arrays of one argument: itself, or the entries of a list."""
    if isinstance(x, list):
        return [_as_torch(one) for one in x]
    return to_torch(x) if isinstance(x, np.ndarray) else x


def _as_numpy(x: Any) -> Any:
    """The tensors of a result: itself, or the fields of a named tuple."""
    if isinstance(x, tuple) and hasattr(x, "_make"):
        return x._make(map(_as_numpy, x))
    return x.numpy() if is_torch(x) else x
