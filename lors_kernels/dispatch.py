"""Which code runs an operation.

`backend=None` takes the first backend of an order that is there and can work where the tensors are. It passes over what is
absent: a module that was not built, a package that is not installed, no GPU. It does not pass over what is there and broken
or misconfigured: that is an error with its reason, because nobody asked for slower code. A named backend runs or raises with
the reason. Nothing falls back behind the caller's back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from .arrays import Array, device_of, is_torch, on_numpy
from .types import MisconfiguredError


class Availability(NamedTuple):
    """Whether a backend can run. `probe()` of its module returns (True, what it runs on) or (False, what is absent); what it
    raises is why the backend is broken."""

    ok: bool
    reason: str  # what it runs on, or why it cannot run
    broken: bool = False  # there, and cannot run all the same
    misconfigured: bool = False  # broken by a variable of the environment, which the reason names

    @property
    def state(self) -> str:
        return "available" if self.ok else "broken" if self.broken else "not available"


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run; or, if none was, none is there or the one to be used is broken."""


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
    "truncated_svd": ("cuda", "triton", "reference"),
    "apply_update": ("reference",),
}


@cache
def load(name: str) -> ModuleType:
    return import_module(_MODULES[name])


@cache
def availability(name: str) -> Availability:
    """Success and failure are both remembered: a broken library is loaded once, and its reason stays the same."""
    try:
        return Availability(*load(name).probe())
    except MisconfiguredError as error:
        return Availability(False, str(error), broken=True, misconfigured=True)
    except Exception as error:
        return Availability(False, f"{type(error).__name__}: {error}".splitlines()[0], broken=True)


def available_backends() -> dict[str, Availability]:
    """Every backend, and whether it can run here or why not."""
    return {name: availability(name) for name in _MODULES}


def named_or_available(names: Sequence[str] | None) -> list[str]:
    """Backends to look at one by one: those asked for by name, which must be there, or all that are."""
    known = available_backends()
    for name in names or ():
        if name not in known:
            raise ValueError(f"backend: expected one of {', '.join(known)}, got {name!r}")
        if not known[name].ok:
            raise BackendUnavailable(f"{name}: {known[name].reason}")
    return list(names or (name for name, status in known.items() if status.ok))


def operation(name: str, backend: str | None, like: Array) -> Callable[..., Any]:
    """A backend's operation, to be called with checked arrays of the kind and in the place of `like`.

    A backend that takes no numpy gets tensors of the same memory, and its tensors come back as arrays. What passed
    `check_out` is never copied: it writes where the caller looks.
    """
    module = select(backend, like, name)
    run: Callable[..., Any] = getattr(module, name)
    return run if module.NUMPY or is_torch(like) else on_numpy(run)


def select(backend: str | None, like: Array, operation: str = "gram_apply") -> ModuleType:
    """The module that runs an operation on tensors placed like `like`."""
    device = device_of(like)
    if backend is not None:
        if backend not in _MODULES:
            raise ValueError(f"backend: expected one of {', '.join(_MODULES)} or None, got {backend!r}")
        order: tuple[str, ...] = (backend,)
    else:
        order = _GPU_ORDER.get(operation, ("reference",)) if device == "cuda" else _ORDER.get(device, ("reference",))
    reasons = []
    for name in order:
        status = availability(name)
        if status.misconfigured:
            raise MisconfiguredError(status.reason)
        if status.broken and backend is None:
            raise BackendUnavailable(f"{name} is broken: {status.reason} (mend it, or name another backend)")
        reason = status.reason if not status.ok else _unfit(load(name), device, operation)
        if reason is None:
            return load(name)
        reasons.append(f"{name}: {reason}")
    raise BackendUnavailable("; ".join(reasons))


def _unfit(module: ModuleType, device: str, operation: str) -> str | None:
    """Why a backend that runs here does not do this; None if it does."""
    if module.DEVICES and device not in module.DEVICES:
        return f"runs on {', '.join(module.DEVICES)}, got tensors on {device}"
    return None if hasattr(module, operation) else f"has no {operation}"
