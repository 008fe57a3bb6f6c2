"""A converter that is somebody else's: imported when it is needed, its errors told in one line, its chatter not at all."""

from __future__ import annotations

import contextlib
import logging
import warnings
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
        package = module.partition(".")[0]
        raise LorsError(f"--to {target}: needs {package}: pip install 'lors-merging[export]'{reason}") from None


@contextlib.contextmanager
def converting(name: str, program: str) -> Iterator[None]:
    """Around a converter of transformers' models: what it raises is a LorsError of one line that begins with `name`."""
    bars = import_module("transformers.utils.logging")
    shown, disabled = bars.is_progress_bar_enabled(), logging.root.manager.disable
    bars.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except LorsError:
        raise
    except Exception as error:  # of several libraries
        raise LorsError(f"{name}: {program} does not convert it: {first_line(error)}") from error
    finally:
        logging.disable(disabled)
        if shown:
            bars.enable_progress_bar()
