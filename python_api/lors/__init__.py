"""Merge fine-tuned Whisper experts into one model by low-rank and sparse task vectors (LoRS-Merging).

    import lors

    lors.merge("openai/whisper-small", {"ca": "whisper-ca", "de": "whisper-de"}, out="merged")

What is used is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lors_kernels import __version__

    from .checkpoints.reader import open_checkpoint
    from .engine.report import MergeReport
    from .errors import LorsError
    from .exporting.export import ExportReport, export
    from .merging.in_memory import merge_state_dicts
    from .merging.on_disk import merge, merge_recipe
    from .recipes.recipe import Recipe

# name -> module; loaded on first use, so that `import lors` costs nothing
_EXPORTS = {
    "ExportReport": ".exporting.export",
    "LorsError": ".errors",
    "MergeReport": ".engine.report",
    "Recipe": ".recipes.recipe",
    "export": ".exporting.export",
    "merge": ".merging.on_disk",
    "merge_recipe": ".merging.on_disk",
    "merge_state_dicts": ".merging.in_memory",
    "open_checkpoint": ".checkpoints.reader",
    "__version__": "lors_kernels",
}

__all__ = [
    "ExportReport",
    "LorsError",
    "MergeReport",
    "Recipe",
    "__version__",
    "export",
    "merge",
    "merge_recipe",
    "merge_state_dicts",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
