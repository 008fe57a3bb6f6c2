"""Which code runs an operation.

`backend=None` takes the first available backend that can work where the tensors are. A named backend runs or raises with
the reason; nothing falls back behind the caller's back.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from .arrays import Array, device_of


class Availability(NamedTuple):
    ok: bool
    reason: str  # what it runs on, or why it cannot run


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name, or all were tried, and none can run."""


_MODULES = {
    "cpu": "lors_kernels.backends.cpu",
    "cuda": "lors_kernels.backends.cuda",
    "triton": "lors_kernels.backends.triton.backend",
    "reference": "lors_kernels.reference",
}
_ORDER = {"cpu": ("cpu", "reference")}
# Tensors on a GPU, by operation. Not yet measured: compiled code first because it needs no compiler at run time, and
# both compute the same thing. `python -m benchmarks.gpu` is what decides; put its answer here.
_GPU_ORDER = {
    "gram_apply": ("cuda", "triton", "reference"),
    "residual_threshold": ("cuda", "triton", "reference"),
    "merge_update": ("cuda", "triton", "reference"),
    "ties_update": ("cuda", "triton", "reference"),
    "apply_update": ("reference",),
}


@cache
def availability(name: str) -> Availability:
    """Success and failure are both remembered: a broken library is loaded once, and its reason stays the same."""
    try:
        return Availability(*import_module(_MODULES[name]).probe())
    except Exception as error:
        return Availability(False, f"{type(error).__name__}: {error}".splitlines()[0])


def available_backends() -> dict[str, Availability]:
    """Every backend, and whether it can run here or why not."""
    return {name: availability(name) for name in _MODULES}


def select(backend: str | None, like: Array, operation: str = "gram_apply") -> ModuleType:
    """The module that runs an operation on tensors placed like `like`."""
    device = device_of(like)
    if backend is not None:
        if backend not in _MODULES:
            raise ValueError(f"backend: expected one of {', '.join(_MODULES)} or None, got {backend!r}")
        order: tuple[str, ...] = (backend,)
    else:
        order = _GPU_ORDER[operation] if device == "cuda" else _ORDER.get(device, ("reference",))
    reasons = []
    for name in order:
        status = availability(name)
        if not status.ok:
            reasons.append(f"{name}: {status.reason}")
            continue
        module = import_module(_MODULES[name])
        if device in module.DEVICES or not module.DEVICES:
            return module
        reasons.append(f"{name}: runs on {', '.join(module.DEVICES)}, got tensors on {device}")
    raise BackendUnavailable("; ".join(reasons))
