"""Small things every launcher needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import triton
import triton.language as tl

# Integers that say how many: a kernel is not compiled again because one of them is 1, or a multiple of 16.
COUNTS = ("pairs", "matrices", "experts", "m", "rank", "tiles", "chunks", "start")
TL_DTYPES = {"float32": tl.float32, "float16": tl.float16, "bfloat16": tl.bfloat16}


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit`, specialised on those integers only that decide how wide a load may be: columns, and the sides of A."""
    counts = [name for name in inspect.signature(function).parameters if name in COUNTS]
    return triton.jit(function, do_not_specialize=counts)


def on_device(device: Any) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors' one. The interpreter works on CPU tensors."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
