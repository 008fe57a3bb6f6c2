"""What transformers hears in some utterances, and whether another program heard the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import multilingual
from lors.speech.data.audio import SAMPLE_RATE, read_audio
from lors.speech.data.corpus import load_corpus
from lors.speech.demo import RECORDINGS

SECONDS = 2  # of the utterances; the rest of the window is silent
LENGTH = 28  # tokens at most: what whisper.cpp says of a model with 64 positions
TIE = 0.02  # logits that are closer than this may be in another order after another order of sums


class Said(NamedTuple):
    """An utterance of two seconds, and what transformers says of it."""

    language: str
    samples: np.ndarray
    tokens: tuple[int, ...]  # of the text
    words: str
    closest: float  # of the logits of the first and the second choice, over all steps


def by_transformers(model: Path, languages: Sequence[str] = ("de", "es", "it", "nl"), each: int = 3) -> list[Said]:
    """In float32, greedily, without times."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    torch.set_num_threads(1)
    whisper = WhisperForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    processor = WhisperProcessor.from_pretrained(model)
    found = []
    for language in languages:
        for utterance in load_corpus(RECORDINGS, languages=language, split="test"):
            samples = read_audio(utterance.audio)
            if len(samples) > SECONDS * SAMPLE_RATE or sum(one.language == language for one in found) == each:
                continue
            samples = np.pad(samples, (0, SECONDS * SAMPLE_RATE - len(samples)))
            mel = processor.feature_extractor([samples], sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
            out = whisper.generate(
                mel,
                language=language,
                task="transcribe",
                max_new_tokens=LENGTH,
                return_dict_in_generate=True,
                output_logits=True,
            )
            tokens = tuple(token for token in out["sequences"][0].tolist() if token < multilingual.END)
            closest = min(float(top[0] - top[1]) for top in (step[0].topk(2).values for step in out["logits"]))
            found.append(Said(language, samples, tokens, processor.decode(tokens).strip(), closest))
    return found


def assert_equal(said: Sequence[Said], hear: Callable[[Said], Any], of: str = "words", tie: float = TIE) -> None:
    """`hear` gives the words (or tokens) of every utterance in which transformers' choices were not as close as a tie."""
    compared = [(one, hear(one)) for one in said]
    decided = [(one, heard) for one, heard in compared if one.closest > tie]
    assert len(decided) > len(said) / 2, "most utterances are decided"
    wrong = [(getattr(one, of), heard) for one, heard in decided if heard != getattr(one, of)]
    assert not wrong, wrong
