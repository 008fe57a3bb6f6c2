"""A converter that is somebody else's: imported when it is needed, its errors told in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

from ..errors import LorsError, first_line

__all__ = ["converting", "needed"]


def needed(module: str, target: str) -> ModuleType:
    """A module of the extra `export`; LorsError that names the command where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        reason = f" ({first_line(error)})" if not isinstance(error, ModuleNotFoundError) else ""
        raise LorsError(
            f"--to {target}: needs {module.partition('.')[0]}: pip install 'lors-merging[export]'{reason}"
        ) from None


@contextlib.contextmanager
def converting(name: str, program: str) -> Iterator[None]:
    """Turns what a converter raises into a LorsError of one line."""
    try:
        yield
    except LorsError:
        raise
    except Exception as error:  # of several libraries
        raise LorsError(f"{name}: {program} does not convert it: {first_line(error)}") from error
