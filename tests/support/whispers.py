"""Tiny Whispers for tests, made from the generated checkpoints: other dtypes, OpenAI's naming, damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from lors.merging.verify import allowed_disagreements, disagreements

State = dict[str, np.ndarray]

# Hugging Face -> openai-whisper, applied in order
_RENAMES = (
    ("model.", ""), (".layers.", ".blocks."), (".self_attn_layer_norm.", ".attn_ln."),
    (".encoder_attn_layer_norm.", ".cross_attn_ln."), (".final_layer_norm.", ".mlp_ln."), (".self_attn.", ".attn."),
    (".encoder_attn.", ".cross_attn."), (".q_proj.", ".query."), (".k_proj.", ".key."), (".v_proj.", ".value."),
    (".out_proj.", ".out."), (".fc1.", ".mlp.0."), (".fc2.", ".mlp.2."), ("decoder.embed_tokens.", "decoder.token_embedding."),
    ("decoder.embed_positions.weight", "decoder.positional_embedding"),
    ("encoder.embed_positions.weight", "encoder.positional_embedding"),
    ("encoder.layer_norm.", "encoder.ln_post."), ("decoder.layer_norm.", "decoder.ln."),
)  # fmt: skip


def openai_name(name: str) -> str:
    for theirs, ours in _RENAMES:
        name = name.replace(theirs, ours)
    return name


def load(directory: Path) -> State:
    return load_file(directory / "model.safetensors")


def copy(source: Path, target: Path, change: Callable[[State], object] | None = None, **config: object) -> Path:
    """A copy of a checkpoint directory whose tensors went through `change`, and whose config.json got `config`."""
    shutil.copytree(source, target)
    state = load(source)
    if change is not None:
        state = change(state) or state  # type: ignore[assignment]
    (target / "model.safetensors").unlink()
    save_file(
        {name: np.ascontiguousarray(x) for name, x in state.items()}, target / "model.safetensors", {"format": "pt"}
    )
    if config:
        path = target / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def cast(dtype: str) -> Callable[[State], State]:
    kind = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    return lambda state: {name: x.astype(kind) for name, x in state.items()}


def save_openai(state: State, path: Path, dims: dict[str, int]) -> Path:
    import torch

    tensors = {openai_name(name): torch.from_numpy(x.copy()) for name, x in state.items()}
    torch.save({"dims": dims, "model_state_dict": tensors}, path)
    return path


def by_definition(
    base: State,
    experts: list[State],
    rank: int = 7,
    density: float = 0.2,
    lam: float = 0.2,
    weights: list[float] | None = None,
) -> State:
    """The merge written down from the method's definition in float64 numpy: the tests' own reading of it."""
    merged = {}
    for name, w0 in base.items():
        w0 = w0.astype(np.float64)
        total = np.zeros_like(w0)
        for expert, weight in zip(experts, weights or [1.0] * len(experts), strict=True):
            delta = (expert[name].astype(np.float32) - base[name].astype(np.float32)).astype(np.float64)
            part = delta
            if ("_proj.weight" in name or name.endswith(("fc1.weight", "fc2.weight"))) and "layers" in name:
                u, s, vh = np.linalg.svd(delta, full_matrices=False)
                low = (u[:, :rank] * s[:rank]) @ vh[:rank]
                rest = delta - low
                k = int(rest.size * density)
                keep = np.zeros(rest.size, bool)
                keep[np.argsort(-np.abs(rest).ravel(), kind="stable")[:k]] = True
                part = low + np.where(keep.reshape(rest.shape), rest, 0)
            total += weight * part
        merged[name] = w0 + lam * total
    return merged


def assert_close(merged: State, expected: State, base: State) -> None:
    """An entry whose residual lies within rounding of the threshold may fall on either side: a few per matrix."""
    assert merged.keys() == expected.keys()
    for name, want in expected.items():
        wrong = disagreements(merged[name], want, base[name].astype(np.float64))
        assert wrong <= allowed_disagreements(want.size, 2 if want.ndim == 2 and "embed" not in name else 0), name
