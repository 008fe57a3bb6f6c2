"""What the bridges share: finding a tool in a version that is known, and swapping its functions for ours and back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType, TracebackType
from typing import Any

from ..errors import LorsError


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version: (0, 1, 5) for "0.1.5.dev0"."""
    numbers = []
    for part in text.split(".")[:3]:
        digits = part[: next((i for i, c in enumerate(part) if not c.isdigit()), len(part))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def peer(package: str, distribution: str, oldest: str, extra: str) -> ModuleType:
    """An installed tool, imported; LorsError when it is missing or older than what was tested."""
    try:
        found = version(distribution)
    except PackageNotFoundError:
        raise LorsError(
            f"{distribution}: not installed; expected {distribution} >= {oldest} (pip install 'lors-merging[{extra}]')"
        ) from None
    if release(found) < release(oldest):
        raise LorsError(f"{distribution}: expected version {oldest} or newer, got {found}")
    try:
        return import_module(package)
    except ImportError as error:
        raise LorsError(f"{distribution} {found}: cannot be imported: {str(error).splitlines()[0]}") from error


class Swap:
    """Functions of a tool replaced by ours wherever the tool has bound them by name, until `restore`.

    A context manager, so that `with accelerate(): ...` ends with the tool as it was.
    """

    def __init__(self, tool: str) -> None:
        self.tool = tool
        self._swapped: dict[Callable[..., Any], Callable[..., Any]] = {}  # ours -> theirs

    def accelerate(self, replacements: Mapping[Callable[..., Any], Callable[..., Any]]) -> Swap:
        """replacements: theirs -> ours. LorsError when it is done already."""
        if self._swapped:
            raise LorsError(f"{self.tool}: accelerate was called twice; expected restore in between")
        self._swapped = {ours: theirs for theirs, ours in replacements.items()}
        self._replace(replacements)
        return self

    def restore(self) -> None:
        """The tool's own functions again, also in modules that were imported since. LorsError when nothing is swapped."""
        if not self._swapped:
            raise LorsError(f"{self.tool}: restore was called without accelerate")
        self._replace(self._swapped)
        self._swapped = {}

    def _replace(self, replacements: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        for name, module in list(sys.modules.items()):
            if name != self.tool and not name.startswith(f"{self.tool}."):
                continue
            for attribute, value in list(vars(module).items()):
                if callable(value) and _hashable(value) and value in replacements:
                    setattr(module, attribute, replacements[value])

    def __enter__(self) -> Swap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def _hashable(value: Any) -> bool:
    return type(value).__hash__ is not None


def largest_entries(tensor: Any, count: int, skipped: int = 0) -> Any:
    """A torch tensor's entries from the (skipped + 1)-th to the (skipped + count)-th largest magnitude, zeros elsewhere.

    None where the caller has to do it: a tensor that needs gradients, has NaN or infinity, is empty, or is of a type or
    on a device that no compiled backend handles.
    """
    import torch

    import lors_kernels
    from lors_kernels import KEEP_NONE, Keep, NonFiniteError
    from lors_kernels.arrays import FLOATS, dtype_name
    from lors_kernels.dispatch import select

    if tensor.requires_grad or dtype_name(tensor) not in FLOATS or not tensor.numel():
        return None
    if tensor.layout is not torch.strided or select(None, tensor).NAME == "reference":
        return None
    matrix = tensor.detach().contiguous().view(tensor.shape[0] if tensor.ndim > 1 else 1, -1)
    out = torch.zeros_like(matrix)
    if count:
        try:
            low = lors_kernels.residual_threshold(None, matrix, k=skipped + count)
            high = lors_kernels.residual_threshold(None, matrix, k=skipped) if skipped else KEEP_NONE
        except NonFiniteError:
            return None
        if skipped:
            lors_kernels.ties_update(out, None, [matrix], [Keep(low, high)], [1.0], elect=False, normalize=False)
        else:
            lors_kernels.merge_update(out, None, matrix, None, None, low, 1.0)
    return out.view(tensor.shape)
