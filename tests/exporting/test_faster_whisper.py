"""CTranslate2's format, read by faster-whisper."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lors
import multilingual
import whispers
from helpers import module
from lors.merging.older_files import older_files
from said import Said, assert_equal, by_transformers

faster_whisper = module("faster_whisper", "export")


def hearing(directory: Path, compute_type: str):  # type: ignore[no-untyped-def]
    model = faster_whisper.WhisperModel(str(directory), device="cpu", compute_type=compute_type, cpu_threads=1)

    def hear(
        one: Said,
    ) -> str:  # 30 seconds: what is shorter faster-whisper fills with zeros of the logarithm, not of the sound
        segments, _ = model.transcribe(
            np.pad(one.samples, (0, 28 * 16000)), language=one.language, beam_size=1, best_of=1, temperature=0, without_timestamps=True,
            suppress_blank=False, suppress_tokens=[], max_new_tokens=28, condition_on_previous_text=False,
            compression_ratio_threshold=None, log_prob_threshold=None, no_speech_threshold=None,
        )  # fmt: skip
        return " ".join(segment.text.strip() for segment in segments)

    return hear


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the window of 30 seconds, which faster-whisper takes for granted."""
    return multilingual.write(tmp_path_factory.mktemp("whole") / "model", seconds=30)


@pytest.fixture(scope="module")
def heard(whole: Path) -> list[Said]:
    return by_transformers(whole)


def test_weights_are_taken_as_they_are_stored(whole: Path, tmp_path: Path) -> None:
    """Whatever type config.json names, in which transformers would load them."""
    shutil.copytree(whole, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    weights = load_file(whole / "model.safetensors")
    stored = weights["model.encoder.conv1.weight"] = weights["model.encoder.conv1.weight"] * np.float32(1.0001)
    assert stored.dtype == np.float32 and (stored != stored.astype(np.float16)).any()
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    lors.export(tmp_path / "model", tmp_path / "out", "ctranslate2", dtype="float32")
    assert stored.tobytes() in (tmp_path / "out" / "model.bin").read_bytes()


@pytest.mark.parametrize(("dtype", "tie"), [("float32", 0.02), ("float16", 0.05), ("int8", 0.3)])
def test_faster_whisper_hears_the_words_of_transformers(
    dtype: str, tie: float, whole: Path, heard: list[Said], tmp_path: Path
) -> None:
    report = lors.export(whole, tmp_path / "out", "ctranslate2", dtype=dtype)
    assert report.files.keys() == {
        "config.json",
        "model.bin",
        "preprocessor_config.json",
        "tokenizer.json",
        "vocabulary.json",
    }
    size = {"float32": 4, "float16": 2, "int8": 1}[dtype] * 7.8e6
    assert size < report.files["model.bin"] < 1.2 * size
    assert_equal(heard, hearing(tmp_path / "out", "int8" if dtype == "int8" else "float32"), tie=tie)


def test_a_vocabulary_that_is_taken_for_english(model: Path, tmp_path: Path) -> None:
    """ctranslate2 tells multilingual models by the empty token of openai's vocabulary."""
    from ctranslate2.models import Whisper

    from lors.speech.model.whisper import SHIPPED

    plain = lors.export(model, tmp_path / "plain", "ctranslate2", dtype="float32")
    assert not plain.notices and Whisper(str(tmp_path / "plain")).is_multilingual
    other = lors.export(SHIPPED["tiny"], tmp_path / "other", "ctranslate2", dtype="float32")
    assert other.notices[0].endswith("faster-whisper takes the model for English-only")
    assert not Whisper(str(tmp_path / "other")).is_multilingual


def test_the_tokenizer_of_a_model_of_transformers_4(model: Path, tmp_path: Path) -> None:
    import tokenizers

    source = whispers.copy(model, tmp_path / "in")
    for name, text in older_files(source.iterdir(), []).items():
        (source / name).write_text(text, encoding="utf-8")
    (source / "tokenizer.json").unlink()
    lors.export(source, tmp_path / "out", "ctranslate2")
    old, new = (tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")) for path in (model, tmp_path / "out"))
    assert old.get_vocab() == new.get_vocab()
    for text in ("dijous vint i tres de març", "четверг"):
        assert old.encode(text, add_special_tokens=False).ids == new.encode(text, add_special_tokens=False).ids
