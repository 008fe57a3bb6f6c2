"""A Whisper's vocabulary: its text tokens as bytes, and whether its special tokens lie where openai's programs count them.

openai-whisper and whisper.cpp read no ids of special tokens: they count them from the number of tokens,

    text, <|endoftext|>, <|startoftranscript|>, 99 or 100 languages, <|translate|>, <|transcribe|>, <|startoflm|>,
    <|startofprev|>, <|nospeech|>, <|notimestamps|>, 1501 times
"""

from __future__ import annotations

import hashlib

from ..checkpoints.compatibility import ENGLISH_ONLY, VOCABULARIES
from ..errors import LorsError
from ..merging.older_files import Tokenizer, read_tokenizer
from .model import Whisper

__all__ = ["has_openai_text", "require_openai_vocabulary", "text_tokens"]

_AFTER_LANGUAGES = ("<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "", "<|notimestamps|>")
_TIMES = 1501  # 0.00 to 30.00 seconds in steps of 0.02


def special_tokens(count: int) -> dict[str, int]:
    """The ids that openai's programs take for these tokens in a vocabulary of `count`."""
    end = 50256 if count == ENGLISH_ONLY else 50257
    first = {"<|endoftext|>": end, "<|startoftranscript|>": end + 1, "<|en|>": end + 2}
    tasks = count - _TIMES - len(_AFTER_LANGUAGES)
    return first | {name: tasks + place for place, name in enumerate(_AFTER_LANGUAGES) if name}


def require_openai_vocabulary(whisper: Whisper, program: str) -> Tokenizer | None:
    """The tokenizer, if there is one. LorsError unless the vocabulary is one that `program` knows by its size."""
    count = whisper.dims.n_vocab
    if count not in VOCABULARIES:
        known = ", ".join(f"{size} ({what})" for size, what in VOCABULARIES.items())
        raise LorsError(f"{whisper.name}: {program} knows vocabularies of {known} tokens, got {count}")
    tokenizer = read_tokenizer(whisper.checkpoint.sidecars())
    ids = {**tokenizer.vocab, **tokenizer.added} if tokenizer is not None else {}
    for token, expected in special_tokens(count).items():
        got = ids.get(token)
        if got is not None and got != expected:
            raise LorsError(
                f"{whisper.name}: {program} takes {expected} for {token} in {count} tokens, the tokenizer has {got}"
            )
    return tokenizer


def text_tokens(whisper: Whisper, tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every token before <|endoftext|>, by id."""
    end = special_tokens(whisper.dims.n_vocab)["<|endoftext|>"]
    by_id = {50256: ""} if end > 50256 else {}  # openai's own is empty, and a tokenizer may do without it
    by_id |= {number: token for token, number in tokenizer.vocab.items() if number < end}
    if missing := [number for number in range(end) if number not in by_id]:
        raise LorsError(
            f"{whisper.name}: expected a token for every id below {end} ({tokenizer.where}), {len(missing)} are missing, "
            f"first {missing[0]}"
        )
    try:
        return [bytes(_BYTES[character] for character in by_id[number]) for number in range(end)]
    except KeyError as error:
        raise LorsError(
            f"{tokenizer.where}: expected the characters of byte-level BPE, got {error.args[0]!r}"
        ) from None


def has_openai_text(tokens: list[bytes]) -> bool:
    """Whether these are the text tokens of openai-whisper, which has them in files of its own."""
    return hashlib.sha256(b"".join(len(token).to_bytes(4, "little") + token for token in tokens)).hexdigest() in _TEXTS


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: those that can be printed stand for themselves, the others for those from 256 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()
_TEXTS = {  # SHA-256 of multilingual and English-only text tokens, each after its length in 4 bytes
    "7a1796f07fce01ae84cc2f83b9a72da17dc652ddc339cb113edcc4c60094f418",
    "7cff19521369c7f5f5ed77ed7b730e7491800afb47d01d341e12b3ca740d8543",
}
