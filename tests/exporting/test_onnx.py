"""The ONNX graphs, run by ONNX Runtime, one token after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lors
import multilingual
from helpers import module
from said import LENGTH, Said, assert_equal

onnxruntime = module("onnxruntime", "export")
module("onnxscript", "export")
START, TASK, NO_TIMES = multilingual.END + 1, 50359, 50363


class Graphs:
    """Encoder, decoder and decoder with past, as a program without torch would call them."""

    def __init__(self, directory: Path, extractor: Any, languages: dict[str, int]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        names = ("encoder", "decoder", "decoder_with_past")
        paths = [str(directory / f"{name}_model.onnx") for name in names]
        self.encoder, self.decoder, self.next = (
            onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in paths
        )
        self.extractor, self.languages = extractor, languages

    def hear(self, one: Said) -> tuple[int, ...]:
        mel = self.extractor([one.samples], sampling_rate=16000, return_tensors="np").input_features.astype(np.float32)
        (hidden,) = self.encoder.run(None, {"input_features": mel})
        tokens = [START, self.languages[one.language], TASK, NO_TIMES]
        logits, cache = run(self.decoder, {"input_ids": np.array([tokens]), "encoder_hidden_states": hidden})
        said: list[int] = []
        while len(said) < LENGTH and (token := int(logits[0, -1].argmax())) != multilingual.END:
            said.append(token)
            past = {name.replace("present", "past_key_values"): value for name, value in cache.items()}
            logits, new = run(self.next, {"input_ids": np.array([[token]])} | past)
            cache |= new
        return tuple(token for token in said if token < multilingual.END)


def run(session: Any, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, inputs), strict=True))
    return found.pop("logits"), found


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, for all tests of it: the exporter takes its time."""
    out = tmp_path_factory.mktemp("onnx") / "out"
    lors.export(model, out, "onnx", dtype="float32")
    return out


@pytest.mark.parametrize(("dtype", "tie"), [("float32", 0.02), ("float16", 0.05), ("int8", 0.5)])
def test_the_graphs_say_what_transformers_says(
    dtype: str, tie: float, model: Path, plain: Path, said: list[Said], tmp_path: Path
) -> None:
    from transformers import WhisperProcessor

    out = plain if dtype == "float32" else tmp_path / "out"
    if dtype != "float32":
        lors.export(model, out, "onnx", dtype=dtype)
    assert {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "vocab.json",
    } < {path.name for path in out.iterdir()}
    processor = WhisperProcessor.from_pretrained(out)
    languages = {one.language: processor.tokenizer.convert_tokens_to_ids(f"<|{one.language}|>") for one in said}
    graphs = Graphs(out, processor.feature_extractor, languages)
    assert_equal(said, graphs.hear, "tokens", tie)


def test_batches_and_lengths(plain: Path) -> None:
    """Several utterances at once, first tokens of any number, give each what it gets alone."""
    graphs = Graphs(plain, None, {})
    rng = np.random.default_rng(0)
    mel = rng.standard_normal((3, 80, 200)).astype(np.float32)
    (hidden,) = graphs.encoder.run(None, {"input_features": mel})
    for length in (1, 2, 7, 40):
        tokens = rng.integers(0, 900, (3, length))
        together, cache = run(graphs.decoder, {"input_ids": tokens, "encoder_hidden_states": hidden})
        assert together.shape == (3, length, 51865) and cache["present.1.decoder.key"].shape == (3, 4, length, 32)
        for row in range(3):
            alone, _ = run(
                graphs.decoder, {"input_ids": tokens[row : row + 1], "encoder_hidden_states": hidden[row : row + 1]}
            )
            np.testing.assert_allclose(together[row], alone[0], rtol=0, atol=1e-3)
        if length > 1:
            short, cache = run(graphs.decoder, {"input_ids": tokens[:, :-1], "encoder_hidden_states": hidden})
            past = {name.replace("present", "past_key_values"): value for name, value in cache.items()}
            last, _ = run(graphs.next, {"input_ids": tokens[:, -1:]} | past)
            np.testing.assert_allclose(last[:, 0], together[:, -1], rtol=0, atol=1e-3)
