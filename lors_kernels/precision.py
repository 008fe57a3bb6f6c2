"""Library products in float32, whatever the user has set: with tf32 a Krylov basis would lose its orthogonality.

torch has an old switch (`set_float32_matmul_precision`) and, from 2.9 on, one per library (`fp32_precision`), and refuses
to read the old one where they contradict each other. Both belong to the process, so concurrent decompositions share one
visit: the first saves and sets, the last restores.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_visitors = 0
_before: tuple[str | None, list[tuple[Any, str]]] = (None, [])


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products are float32 inside, and what the user has set holds again behind it."""
    global _visitors, _before
    with _lock:
        if _visitors == 0:
            _before = _set()
        _visitors += 1
    try:
        yield
    finally:
        with _lock:
            _visitors -= 1
            if _visitors == 0:
                _restore(*_before)


def _switches() -> list[Any]:
    """Those of torch 2.9 and newer."""
    import torch

    found = [getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn") if hasattr(torch.backends, name)]
    return [switch for switch in found if hasattr(switch, "fp32_precision")]


def _set() -> tuple[str | None, list[tuple[Any, str]]]:
    import torch

    new = [(switch, switch.fp32_precision) for switch in _switches()]
    old: str | None = None
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        if not new:
            raise
        # the user has set the new switches, which the old one contradicts: they are what counts
    else:
        torch.set_float32_matmul_precision("highest")
    for switch, _ in new:
        switch.fp32_precision = "ieee"
    return old, new


def _restore(old: str | None, new: list[tuple[Any, str]]) -> None:
    import torch

    if old is not None:
        torch.set_float32_matmul_precision(old)
    for switch, value in new:
        switch.fp32_precision = "none"  # follows the general switch, as it does where nobody has set it
        if switch.fp32_precision != value:
            switch.fp32_precision = value
