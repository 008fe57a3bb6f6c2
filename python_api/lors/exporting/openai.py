"""openai-whisper's checkpoint: dims and a state dict under its names, as `whisper.load_model` reads it."""

from __future__ import annotations

import numpy as np

from ..checkpoints.tensor_info import FLOATS
from ..checkpoints.writer import TorchWriter
from ..files.directory import OutputDirectory
from .model import Whisper, require_tied
from .vocabulary import has_openai_text, require_openai_vocabulary, text_tokens

__all__ = ["DTYPES", "write"]

FILE = "model.pt"
DTYPES = ("float32", "float16")


def write(whisper: Whisper, output: OutputDirectory, dtype: str, notices: list[str]) -> None:
    """Writes model.pt. LorsError for a vocabulary that openai-whisper does not know."""
    require_tied(whisper)
    tokenizer = require_openai_vocabulary(whisper, "openai-whisper")
    if tokenizer is not None and not has_openai_text(text_tokens(whisper, tokenizer)):
        notices.append(
            f"{whisper.name}: its text tokens are not openai's: openai-whisper, which knows only these, says other words"
        )
    specs = [(stored.weight.openai, FLOATS[dtype], stored.weight.shape) for stored in whisper.weights]
    with TorchWriter(output.path / FILE, specs, whisper.dims.model_dump()) as writer:
        for stored in whisper.weights:
            start = 0
            for values in whisper.slabs(stored, dtype):
                writer.write(stored.weight.openai, np.ascontiguousarray(values), start)
                start += values.size
        writer.finish()
