"""Training targets: what the decoder must say for an utterance and a task."""

from __future__ import annotations

from typing import Any

from ..data.utterance import Utterance

__all__ = ["labels"]


def labels(tokenizer: Any, utterance: Utterance, task: str) -> list[int]:
    """``<|lang|><|task|><|notimestamps|> text <|endoftext|>``; the model itself puts the start token before them.

    The language token is the spoken language in both tasks: Whisper translates into English only.
    """
    reference = utterance.reference(task)
    if reference is None:
        raise ValueError(f"expected a reference for {task}, got none in {utterance.id!r}")
    tokenizer.set_prefix_tokens(language=utterance.language, task=task, predict_timestamps=False)
    return list(tokenizer(reference).input_ids[1:])
