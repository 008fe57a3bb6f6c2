"""Training targets: what the decoder must say for an utterance and a task. And languages that were added to Whisper's."""

from __future__ import annotations

from typing import Any

from ...errors import LorsError
from ..data.utterance import Utterance

__all__ = ["labels", "language_token"]


def language_token(language: str) -> str:
    """``gl`` -> ``<|gl|>``: how `generate` is asked for a language, also for one that transformers has not heard of."""
    return f"<|{language}|>"


def labels(tokenizer: Any, utterance: Utterance, task: str) -> list[int]:
    """``<|lang|><|task|><|notimestamps|> text <|endoftext|>``; the model itself puts the start token before them.

    The language token is the spoken language in both tasks: Whisper translates into English only.
    """
    reference = utterance.reference(task)
    if reference is None:
        raise ValueError(f"expected a reference for {task}, got none in {utterance.id!r}")
    # not by set_prefix_tokens, which knows Whisper's own languages alone
    prefix = [language_token(utterance.language), f"<|{task}|>", "<|notimestamps|>"]
    ids = tokenizer.convert_tokens_to_ids(prefix)
    for token, number in zip(prefix, ids, strict=True):
        if number in (None, tokenizer.unk_token_id):
            raise LorsError(f"{utterance.id}: expected a tokenizer with the token {token}, got none")
    return [*ids, *tokenizer(reference, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
