"""whisper.cpp's file: read back by its layout, and by whisper.cpp itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import ggml_file
import lors
import multilingual
import whispers
from helpers import module
from lors.exporting.ggml import BLOCK, DTYPES, mel_filters, quantized


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ggml")
    for dtype in DTYPES:
        lors.export(model, root / dtype, "ggml", dtype=dtype)
    return {dtype: root / dtype / "ggml-model.bin" for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_file(dtype: str, model: Path, files: dict[str, Path]) -> None:
    found = ggml_file.read(files[dtype])
    assert found.hparams == {
        "n_vocab": 51865, "n_audio_ctx": 100, "n_audio_state": 128, "n_audio_head": 4, "n_audio_layer": 2, "n_text_ctx": 64,
        "n_text_state": 128, "n_text_head": 4, "n_text_layer": 2, "n_mels": 80, "ftype": {"float16": 1, "int8": 2007}[dtype],
    }  # fmt: skip
    state = {whispers.openai_name(name): x for name, x in load_file(model / "model.safetensors").items()}
    assert found.tensors.keys() == state.keys()
    for name, values in state.items():
        got, kind = found.tensors[name], found.types[name]
        if name.endswith(("conv1.bias", "conv2.bias")):
            values = values[:, None]
        assert got.shape == values.shape, name
        wide = values.ndim == 1 or "positional" in name or values.shape[-1] == 1
        assert kind == (0 if wide else 1 if dtype == "float16" or values.ndim == 3 else 8), name
        bound = np.abs(values).max() * (1 / 254 + 2**-11) if kind == 8 else 0  # half a step, and the rounded factor
        assert np.abs(got - (values.astype(np.float16) if kind == 1 else values)).max() <= bound, name


def test_the_tokens_are_the_bytes_of_the_texts(model: Path, files: dict[str, Path]) -> None:
    tokenizer = module("transformers", "speech").WhisperTokenizer.from_pretrained(model)
    tokens = ggml_file.read(files["float16"]).tokens
    assert len(tokens) == multilingual.END
    for text in ("dijous vint i tres de març", "четверг пятого", "zweiundzwanzigster März"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert b"".join(tokens[number] for number in ids).decode() == text


def test_the_older_vocabulary_serves_too(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """What lies beside a model of transformers 4, which may have no tokenizer.json."""
    from lors.merging.older_files import older_files

    source = whispers.copy(model, tmp_path / "in")
    for name, text in older_files(source.iterdir(), []).items():
        (source / name).write_text(text, encoding="utf-8")
    (source / "tokenizer.json").unlink()
    lors.export(source, tmp_path / "out", "ggml")
    assert (tmp_path / "out" / "ggml-model.bin").read_bytes() == files["float16"].read_bytes()
    added = json.loads((source / "added_tokens.json").read_text(encoding="utf-8"))
    (source / "added_tokens.json").write_text(json.dumps(added | {"<|translate|>": 60000}))
    with pytest.raises(lors.LorsError, match="takes 50358 for <|translate|> in 51865 tokens, the tokenizer has 60000"):
        lors.export(source, tmp_path / "out2", "ggml")


@pytest.mark.parametrize("count", [80, 128])
def test_mel_filters_are_whispers(count: int) -> None:
    transformers = module("transformers", "speech")
    expected = transformers.WhisperFeatureExtractor(feature_size=count).mel_filters.T
    found = mel_filters(count)
    assert found.shape == expected.shape == (count, 201)
    np.testing.assert_allclose(found, expected, atol=1e-9)  # the largest is 0.026


def test_q8_0() -> None:
    """By hand: 127 steps on each side of zero, halves away from zero, a block of zeros, one step of float16 in the factor."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((50, BLOCK)).astype(np.float32)
    values[0] = 0
    values[1] = np.resize(np.float32([127, -127, 0.5, -0.5, 1.5, 2.5, 0.49]), BLOCK)
    made = quantized(values.reshape(-1))
    assert made.dtype.itemsize == 34 and made["d"][0] == 0 and not made["q"][0].any()
    assert made["d"][1] == 1 and made["q"][1][:7].tolist() == [127, -127, 1, -1, 2, 3, 0]
    largest = np.abs(values).max(axis=1, keepdims=True)
    assert np.abs(made["q"]).max() == 127
    assert (
        np.abs(made["d"].astype(np.float32)[:, None] * made["q"] - values) <= largest / 254 + largest * 2**-11 + 1e-9
    ).all()
