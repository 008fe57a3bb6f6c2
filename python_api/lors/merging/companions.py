"""What a merged model needs beside its weights to be loaded, and which input it is taken from.

The base's files are kept. A part that the base lacks comes, whole, from the first expert that has it. What a Whisper
needs and no input has is said, and the configuration, without which nothing can be loaded, is required.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.reader import Checkpoint
from ..errors import LorsError

__all__ = ["companions", "dims"]


class _Part(NamedTuple):
    """Files that belong together. The part is there when one of the sets in `either` is."""

    name: str
    either: tuple[frozenset[str], ...]
    others: frozenset[str] = frozenset()

    @property
    def files(self) -> frozenset[str]:
        return self.others.union(*self.either)


def _any(*names: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset([name]) for name in names)


CONFIGURATION = _Part("a configuration (config.json)", _any("config.json"))
PARTS = (
    CONFIGURATION,
    _Part("generation settings (generation_config.json)", _any("generation_config.json")),
    _Part(
        "a feature extractor (processor_config.json or preprocessor_config.json)",
        _any("preprocessor_config.json", "processor_config.json", "feature_extractor_config.json"),
    ),
    _Part(
        "a tokenizer (tokenizer.json, or vocab.json and merges.txt)",
        (frozenset(["tokenizer.json"]), frozenset(["vocab.json", "merges.txt"])),
        frozenset(["tokenizer_config.json", "normalizer.json", "added_tokens.json", "special_tokens_map.json"])
        | {"chat_template.jinja"},
    ),
)


def companions(base: Checkpoint, experts: Sequence[Checkpoint], notices: list[str]) -> list[Path]:
    """The files to copy; what the user should know of them is added to `notices`.

    LorsError for a Whisper of transformers without a configuration.
    """
    files: list[Path] = []
    missing: list[_Part] = []
    for part in PARTS:
        holder = next((one for one in (base, *experts) if _has(one, part)), None)
        files += [path for path in (holder or base).sidecars() if path.name in part.files]
        if holder is None:
            missing.append(part)
        elif holder is not base:
            notices.append(f"{base.name} lacks {part.name}: that of {holder.name} is taken")
    if CONFIGURATION in missing and base.naming == "hf-whisper":
        raise LorsError(
            f"{base.path}: expected config.json beside the weights of the base or of an expert: without it the merged "
            f"model cannot be loaded"
        )
    if missing and base.naming == "hf-whisper":
        names = ", ".join(part.name for part in missing)
        notices.append(f"no input has {names}: the speech recognition pipeline needs what is missing")
    elif CONFIGURATION in missing and base.naming == "other":
        notices.append(f"no input has {CONFIGURATION.name}: the output is weights alone")
    return files


def dims(base: Checkpoint, experts: Sequence[Checkpoint], notices: list[str]) -> dict[str, Any] | None:
    """What openai-whisper builds its model by, from the base or else from an expert; None for other models."""
    if base.naming != "openai-whisper" or base.dims is not None:
        return base.dims
    holder = next((expert for expert in experts if expert.dims is not None), None)
    if holder is None:
        notices.append("no input has openai-whisper's dims: it does not load what is written, a model.safetensors")
        return None
    notices.append(f"{base.name} lacks openai-whisper's dims: those of {holder.name} are taken")
    return holder.dims


def _has(checkpoint: Checkpoint, part: _Part) -> bool:
    there = {path.name for path in checkpoint.sidecars()}
    return any(files <= there for files in part.either)
