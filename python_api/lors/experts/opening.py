"""What an opened model is to the engine: a checkpoint, an adapter or an expert file."""

from __future__ import annotations

from typing import Literal

from ..checkpoints.reader import Checkpoint
from .expert_file import is_expert_file
from .source import FileSource, Source


def kind_of(checkpoint: Checkpoint) -> Literal["checkpoint", "adapter", "expert file"]:
    if is_expert_file(checkpoint):
        return "expert file"
    return "checkpoint" if checkpoint.adapter is None else "adapter"


def source_of(checkpoint: Checkpoint, base: Checkpoint) -> Source:
    """What the engine reads a model from: a checkpoint, an adapter, or an expert file that was made for `base`."""
    kind, names = kind_of(checkpoint), list(base.tensors)
    if kind == "expert file":
        from .expert_source import ExpertSource

        source = ExpertSource(checkpoint, FileSource(base))
        source.require_names(base)
        return source
    if kind == "adapter":
        from .adapter import AdapterSource

        return AdapterSource(checkpoint, FileSource(base, names))
    return FileSource(checkpoint, names)
