"""A Whisper small enough to train from nothing in minutes, that is a Whisper in every file it saves.

Two seconds of audio instead of thirty, a vocabulary of 1,024 instead of 51,865, 1.15 million parameters; the classes,
file formats and `generate` are transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Size", "build_model", "build_processor"]

_WINDOW = 2  # seconds
_TASK_TOKENS = (
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)


@dataclass(frozen=True, slots=True)
class Size:
    """Width, layers (encoder and decoder each) and vocabulary of the model."""

    width: int = 128
    layers: int = 2
    vocabulary: int = 1024


def build_processor(texts: Iterable[str], size: Size) -> Any:
    """WhisperProcessor whose byte-level BPE was trained on `texts`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer
    from transformers.models.whisper.tokenization_whisper import LANGUAGES as WHISPER_LANGUAGES

    # All hundred language tokens in Whisper's order: WhisperTokenizer computes a language's id as its position in that
    # list. With fewer, "catalan" silently becomes <|translate|>.
    languages = [f"<|{code}|>" for code in WHISPER_LANGUAGES]
    specials = ["<|endoftext|>", "<|startoftranscript|>", *languages, *_TASK_TOKENS]

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary - len(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    vocabulary, merges = _tables(bpe)
    # Special ids follow the vocabulary, as in Whisper; should the text not fill it, unused entries do.
    for unused in range(len(vocabulary), size.vocabulary - len(specials)):
        vocabulary[f"<unused{unused}>"] = unused
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": specials[1:]})
    tokenizer.set_prefix_tokens(language="english", task="transcribe")  # the ids exist only now
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=_WINDOW)  # type: ignore[no-untyped-call]
    return WhisperProcessor(feature_extractor=extractor, tokenizer=tokenizer)  # type: ignore[no-untyped-call]


def _tables(bpe: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    import json

    model = json.loads(bpe.to_str())["model"]
    return dict(model["vocab"]), [tuple(pair) for pair in model["merges"]]


def build_model(processor: Any, languages: Iterable[str], size: Size) -> Any:
    """WhisperForConditionalGeneration with fresh weights, and a generation_config that knows languages and tasks."""
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    token = processor.tokenizer.convert_tokens_to_ids
    end = token("<|endoftext|>")
    special = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": token("<|startoftranscript|>"),
    }
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(processor.tokenizer),
            num_mel_bins=80,
            d_model=size.width,
            encoder_layers=size.layers,
            decoder_layers=size.layers,
            encoder_attention_heads=size.width // 32,
            decoder_attention_heads=size.width // 32,
            encoder_ffn_dim=4 * size.width,
            decoder_ffn_dim=4 * size.width,
            max_source_positions=_WINDOW * 50,
            max_target_positions=32,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **special,
        )
    )
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        **special,
        max_length=32,
        is_multilingual=True,
        return_timestamps=False,
        lang_to_id={f"<|{code}|>": token(f"<|{code}|>") for code in (*languages, "en")},
        task_to_id={task: token(f"<|{task}|>") for task in ("translate", "transcribe")},
        no_timestamps_token_id=token("<|notimestamps|>"),
        prev_sot_token_id=token("<|startofprev|>"),
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return model
