"""Small things every launcher needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import triton.language as tl

TL_DTYPES = {"float32": tl.float32, "float16": tl.float16, "bfloat16": tl.bfloat16}


def on_device(device: Any) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors' one. The interpreter works on CPU tensors."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
