"""Weight files as tests write them, right and wrong."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lors.checkpoints.reader import open_checkpoint
from lors.errors import LorsError

EMBEDDING, HEAD = "model.decoder.embed_tokens.weight", "proj_out.weight"


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def whisper(
    d: int = 4, layers: int = 1, tokens: int = 20, mel: int = 8, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """A few tensors named and shaped as transformers' Whisper has them."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.encoder.conv1.weight": (d, mel, 3), EMBEDDING: (tokens, d)}
    for part in ("encoder", "decoder"):
        for layer in range(layers):
            shapes[f"model.{part}.layers.{layer}.self_attn.q_proj.weight"] = (d, d)
            shapes[f"model.{part}.layers.{layer}.self_attn.out_proj.weight"] = (d, d)
            shapes[f"model.{part}.layers.{layer}.fc1.weight"] = (4 * d, d)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write(path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None) -> Path:
    """A Hugging Face directory."""
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def error_of(source: Any) -> str:
    with pytest.raises(LorsError) as caught:
        open_checkpoint(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
