"""openai-whisper's checkpoint: its keys and its dims, and openai-whisper's own loader and decoder."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import lors
import whispers
from helpers import module
from lors.checkpoints.reader import open_checkpoint
from lors.checkpoints.whisper import Dims, weights
from lors.exporting.vocabulary import has_openai_text
from said import LENGTH, Said, assert_equal

DIMS = {
    "n_mels": 80, "n_audio_ctx": 100, "n_audio_state": 128, "n_audio_head": 4, "n_audio_layer": 2, "n_vocab": 51865,
    "n_text_ctx": 64, "n_text_state": 128, "n_text_head": 4, "n_text_layer": 2,
}  # fmt: skip


def test_keys_and_dims(model: Path, tmp_path: Path) -> None:
    lors.export(model, tmp_path / "out", "openai")
    found = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert found["dims"] == DIMS and found.keys() == {"dims", "model_state_dict"}
    expected = {whispers.openai_name(name): x for name, x in load_file(model / "model.safetensors").items()}
    assert found["model_state_dict"].keys() == expected.keys()
    for name, values in found["model_state_dict"].items():
        np.testing.assert_array_equal(values.numpy(), expected[name], err_msg=name)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.naming == "openai-whisper" and checkpoint.dims == DIMS


def test_each_name_once() -> None:
    listed = weights(Dims(**DIMS))
    assert len({one.transformers for one in listed}) == len({one.openai for one in listed}) == len(listed)
    assert all(whispers.openai_name(one.transformers) == one.openai for one in listed)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_openai_whisper_says_what_transformers_says(dtype: str, model: Path, said: list[Said], tmp_path: Path) -> None:
    whisper = module("whisper", "export")
    lors.export(model, tmp_path / "out", "openai", dtype=dtype)
    loaded = whisper.load_model(str(tmp_path / "out" / "model.pt"), device="cpu")

    def hear(one: Said) -> tuple[int, ...]:
        options = whisper.DecodingOptions(
            language=one.language,
            without_timestamps=True,
            fp16=False,
            suppress_tokens="",
            suppress_blank=False,
            sample_len=LENGTH,
        )
        return tuple(
            whisper.decode(loaded, whisper.log_mel_spectrogram(one.samples.astype(np.float32)), options).tokens
        )

    assert_equal(said, hear, "tokens", 0.02 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("name", ["multilingual", "gpt2"])
def test_the_text_tokens_of_openai_are_known(name: str) -> None:
    whisper = module("whisper", "export")
    lines = (Path(whisper.__file__).parent / "assets" / f"{name}.tiktoken").read_bytes().split()
    ranks = {int(rank): base64.b64decode(token) for token, rank in zip(lines[::2], lines[1::2], strict=True)}
    tokens = [ranks[number] for number in range(len(ranks))]
    assert has_openai_text(tokens) and not has_openai_text(tokens[:-2]) and not has_openai_text([*tokens[:-1], b"x"])


def test_a_vocabulary_of_its_own_is_told(model: Path, tmp_path: Path) -> None:
    (notice,) = lors.export(model, tmp_path / "out", "openai").notices
    assert notice.endswith("its text tokens are not openai's: openai-whisper, which knows only these, says other words")
