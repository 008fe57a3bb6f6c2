"""Loading Whisper for work on a device, with the errors a user can put right."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import LorsError
from ..messages import nearest

__all__ = ["SHIPPED", "load_model", "load_processor", "require_languages", "resolve_model", "torch_device"]

# Tiny bases trained by pretrain.py; bases/README.md holds the command and the log.
SHIPPED = {"tiny": Path(__file__).parent / "bases" / "final", "tiny-early": Path(__file__).parent / "bases" / "early"}


def resolve_model(source: str | Path) -> str:
    """A path, a hub id, or `tiny` and `tiny-early` for the shipped bases; checked to be a Whisper where it is local."""
    path = SHIPPED.get(str(source), Path(source))
    if not path.exists() and (path.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1):
        raise LorsError(f"{source}: expected a model directory, a hub id or {' or '.join(SHIPPED)}, got none of them")
    if path.exists():
        _check_whisper(path)
    return str(path)


def _check_whisper(path: Path) -> None:
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LorsError(f"{path}: expected a model directory with config.json: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "whisper":
        raise LorsError(f"{path}: expected a Whisper checkpoint, got model_type {kind!r}")


def load_model(source: str | Path, *, device: str = "cpu", dtype: str = "float32") -> Any:
    """WhisperForConditionalGeneration in evaluation mode on the device."""
    import torch
    from transformers import WhisperForConditionalGeneration

    where = torch_device(device)
    path = resolve_model(source)
    try:
        model = WhisperForConditionalGeneration.from_pretrained(path, dtype=getattr(torch, dtype))
    except (OSError, ValueError, RuntimeError) as error:
        raise LorsError(f"{source}: cannot load the model: {error}") from error
    return model.to(where).eval()


def load_processor(source: str | Path) -> Any:
    """WhisperProcessor of a model directory or hub id."""
    from transformers import WhisperProcessor

    try:
        return WhisperProcessor.from_pretrained(resolve_model(source))
    except (OSError, ValueError) as error:
        raise LorsError(f"{source}: cannot load the processor: {error}") from error


def torch_device(device: str) -> Any:
    """`cpu`, `cuda`, `cuda:1`: the device itself; LorsError when it is not there."""
    import torch

    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise LorsError(f"device: expected cpu or cuda, got {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise LorsError(f"device: {device!r} was asked for, and PyTorch {torch.__version__} sees no CUDA device")
    return chosen


def require_languages(model: Any, languages: Iterable[str], source: object) -> None:
    """LorsError naming the first language the model has no token for."""
    known = getattr(model.generation_config, "lang_to_id", None)
    if known is None:
        raise LorsError(f"{source}: expected a multilingual Whisper, got one without language tokens")
    codes = [token[2:-2] for token in known]
    for language in languages:
        if language not in codes:
            raise LorsError(f"{source}: the model has no language {language!r}{nearest(language, codes)}")


def quiet() -> None:
    """Leaves transformers' warnings and loading bars out of a command's output."""
    # Of names that PEFT and transformers still use of each other: nothing a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
