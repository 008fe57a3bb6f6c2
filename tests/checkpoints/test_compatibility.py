"""Whether an expert fits a base, and what the message says where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lors.checkpoints.compatibility import compare
from lors.checkpoints.reader import open_checkpoint
from lors.errors import LorsError
from weights import EMBEDDING, HEAD, whisper, write


def differ(
    tmp_path: Path, base: dict[str, np.ndarray], expert: dict[str, np.ndarray], config: dict[str, Any] | None = None
) -> str | None:
    """The message of compare, None when they fit."""
    number = len(list(tmp_path.iterdir()))
    ours = write(tmp_path / f"base{number}", base)
    theirs = write(tmp_path / f"expert{number}", expert, config)
    with open_checkpoint(ours, name="BASE") as first, open_checkpoint(theirs, name="EXPERT") as second:
        try:
            compare(first, second)
        except LorsError as error:
            assert "\n" not in str(error)
            return str(error)
    return None


def test_equal_architectures_fit(tmp_path: Path) -> None:
    assert differ(tmp_path, whisper(), whisper()) is None
    assert differ(tmp_path, whisper(), whisper(dtype=np.float16)) is None
    assert (
        differ(tmp_path, {**whisper(), "steps": np.ones(1, np.int64)}, {**whisper(), "steps": np.ones(1, np.int32)})
        is None
    )


def test_known_differences_are_named(tmp_path: Path) -> None:
    def message(**expert: int) -> str:
        return str(differ(tmp_path, whisper(2, 2, 51865, 80, np.float16), whisper(**{"d": 2, "layers": 2, **expert})))

    vocabulary = message(tokens=51866, mel=80)
    assert "EXPERT: another vocabulary: expected 51865 (multilingual, up to large-v2) tokens as in BASE" in vocabulary
    assert "got 51866 (large-v3 and turbo)" in vocabulary
    assert "got 51864 (English-only)" in message(tokens=51864, mel=80)
    assert "expected 80 mel bins as in BASE, got 128" in message(tokens=51865, mel=128)
    assert "another model size: expected d_model 2 as in BASE, got 768 (small)" in message(d=768)
    assert "another depth: expected 2 encoder layers as in BASE, got 3" in message(tokens=51865, mel=80, layers=3)
    odd = whisper()
    odd["model.encoder.layers.0.fc1.weight"] = np.zeros((8, 4), np.float32)
    assert "'model.encoder.layers.0.fc1.weight': expected shape [16, 4] as in BASE, got [8, 4]" in str(
        differ(tmp_path, whisper(), odd)
    )


def test_missing_and_extra_tensors_are_counted(tmp_path: Path) -> None:
    base = {**whisper(), **{f"bias.{i}": np.zeros(1, np.float32) for i in range(5)}}
    message = str(differ(tmp_path, base, {**whisper(), "more": np.zeros(1, np.float32)}))
    assert "it lacks 5 tensors 'bias.0', 'bias.1', 'bias.2' and 2 more and has the extra 1 tensor 'more'" in message


def test_namings(tmp_path: Path) -> None:
    names = {
        "model.": "",
        "layers.": "blocks.",
        "self_attn.q_proj": "attn.query",
        "self_attn.out_proj": "attn.out",
        "embed_tokens": "token_embedding",
    }
    openai = {}
    for name, value in whisper().items():
        for old, new in names.items():
            name = name.replace(old, new)
        openai[name] = value
    assert "named as in openai-whisper, those of BASE as in hf-whisper" in str(differ(tmp_path, whisper(), openai))
    bare = {name.removeprefix("model."): value for name, value in whisper().items()}
    assert "lack the prefix 'model.'" in str(differ(tmp_path, whisper(), bare))
    assert "no tensor has the name" in str(differ(tmp_path, whisper(), {"x": np.zeros(1, np.float32)}))


def test_dtypes(tmp_path: Path) -> None:
    def with_query(dtype: Any) -> dict[str, np.ndarray]:
        tensors = whisper()
        name = "model.encoder.layers.0.self_attn.q_proj.weight"
        return {**tensors, name: tensors[name].astype(dtype)}

    assert "expected F32 (float) as in BASE, got I8 (integer)" in str(differ(tmp_path, whisper(), with_query(np.int8)))
    assert "BASE: tensor" in str(differ(tmp_path, with_query(np.complex64), whisper()))
    message = str(differ(tmp_path, whisper(), with_query(np.complex64)))
    assert "EXPERT: tensor 'model.encoder.layers.0.self_attn.q_proj.weight': C64 cannot be merged" in message


def test_tied_head(tmp_path: Path) -> None:
    tied, other = {**whisper(), HEAD: whisper()[EMBEDDING].copy()}, {**whisper(), HEAD: whisper()[EMBEDDING] + 1}
    assert differ(tmp_path, whisper(), tied) is None
    assert differ(tmp_path, tied, whisper()) is None
    assert differ(tmp_path, tied, tied) is None
    assert "differs from its token embedding" in str(differ(tmp_path, whisper(), other))
    assert "lacks 1 tensor 'proj_out.weight'" in str(
        differ(tmp_path, tied, whisper(), config={"tie_word_embeddings": False})
    )
    nearly = {**whisper(), HEAD: whisper()[EMBEDDING].copy()}
    nearly[HEAD][-1, -1] = np.nextafter(nearly[HEAD][-1, -1], np.float32(9))
    for index, (tensors, stored, is_tied) in enumerate(
        [(whisper(), EMBEDDING, True), (tied, HEAD, True), (other, HEAD, False), (nearly, HEAD, False)]
    ):
        with open_checkpoint(write(tmp_path / f"one{index}", tensors)) as checkpoint:
            assert (checkpoint.resolve(HEAD), checkpoint.head_is_tied) == (stored, is_tied)
            assert checkpoint.resolve("nothing") is None
