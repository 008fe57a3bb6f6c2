"""What an opened model is to the engine: a checkpoint, an adapter or an expert file."""

from __future__ import annotations

from ..checkpoints.reader import Checkpoint
from .adapter import AdapterSource
from .expert_file import is_expert_file
from .expert_source import ExpertSource
from .source import FileSource, Source


def source_of(checkpoint: Checkpoint, base: Checkpoint) -> Source:
    """What the engine reads a model from: a checkpoint, an adapter, or an expert file that was made for `base`."""
    if is_expert_file(checkpoint):
        source = ExpertSource(checkpoint, FileSource(base))
        source.require_names(base)
        return source
    names = list(base.tensors)
    if checkpoint.adapter is None:
        return FileSource(checkpoint, names)
    return AdapterSource(checkpoint, FileSource(base, names))
