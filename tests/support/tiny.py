"""Small checkpoints in the Hugging Face Whisper format, without transformers: what the tests of experts and edits merge."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from lors.checkpoints.writer import WeightWriter

WIDTH, FFN, LAYERS, TOKENS = 32, 72, 2, 61  # 72 x 32 and 61 x 32: not all multiples of 64 entries
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape; every kind of tensor that Whisper has."""
    found: dict[str, tuple[int, ...]] = {
        "model.encoder.conv1.weight": (WIDTH, 8, 3),
        "model.encoder.embed_positions.weight": (20, WIDTH),
        "model.decoder.embed_tokens.weight": (TOKENS, WIDTH),
    }
    for stack, blocks in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        for layer in range(LAYERS):
            at = f"model.{stack}.layers.{layer}"
            for block in blocks:
                for role in ("q", "k", "v", "out"):
                    found[f"{at}.{block}.{role}_proj.weight"] = (WIDTH, WIDTH)
                found[f"{at}.{block}.q_proj.bias"] = (WIDTH,)
            found[f"{at}.fc1.weight"], found[f"{at}.fc2.weight"] = (FFN, WIDTH), (WIDTH, FFN)
            found[f"{at}.final_layer_norm.weight"] = (WIDTH,)
    return found


def tensors(seed: int, scale: float) -> dict[str, np.ndarray]:
    """A power-law low-rank part and noise in every tensor."""
    made = {}
    for index, (name, shape) in enumerate(shapes().items()):
        rng = np.random.default_rng([seed, index])
        values = rng.standard_normal(shape)
        if len(shape) == 2 and seed:
            u, s, v = np.linalg.svd(values, full_matrices=False)
            values += 3 * (u * (s[0] * np.arange(1, len(s) + 1) ** -0.7)) @ v
        made[name] = (scale * values).astype(np.float32)
    return made


def write(path: Path, state: dict[str, np.ndarray], dtype: str = "float32") -> Path:
    """A directory with model.safetensors and config.json."""
    path.mkdir(parents=True)
    config = {"model_type": "whisper", "d_model": WIDTH, "vocab_size": TOKENS, "num_mel_bins": 8, "dtype": dtype}
    (path / "config.json").write_text(json.dumps(config))
    kind = np.dtype(DTYPES[dtype])
    with WeightWriter(path, [(name, kind, value.shape) for name, value in state.items()]) as writer:
        for name, value in state.items():
            writer.write(name, value.astype(kind))
        writer.finish()
    return path


def family(root: Path, experts: tuple[str, ...] = ("ca", "de", "es"), dtype: str = "float32") -> dict[str, Path]:
    """{"base": directory, "ca": directory, ...} under `root`; experts are base + small deltas."""
    base = tensors(0, 0.5)
    found = {"base": write(root / "base", base, dtype)}
    for seed, name in enumerate(experts, start=1):
        delta = tensors(seed, 1e-4)
        found[name] = write(root / name, {key: value + delta[key] for key, value in base.items()}, dtype)
    return found
