"""A small model and experts as state dicts, and how near two merges of them are."""

from __future__ import annotations

from typing import Any

import numpy as np

PREFIX = "model.encoder.layers.{}."


def states(
    experts: int = 3, layers: int = 2, dtype: Any = np.float32
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    rng = np.random.default_rng(4)
    shapes: dict[str, tuple[int, ...]] = {
        "model.encoder.conv1.weight": (16, 8, 3),
        "model.decoder.embed_tokens.weight": (50, 16),
    }
    for layer in range(layers):
        for name in ("q", "out"):
            shapes[PREFIX.format(layer) + f"self_attn.{name}_proj.weight"] = (16, 16)
        shapes[PREFIX.format(layer) + "fc1.weight"] = (64, 16)
        shapes[PREFIX.format(layer) + "fc2.weight"] = (16, 64)
    base = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    tuned = {
        f"e{number}": {
            name: (x.astype(np.float32) + 0.01 * rng.standard_normal(x.shape)).astype(dtype) for name, x in base.items()
        }
        for number in range(experts)
    }
    return base, tuned


def close(found: dict[str, Any], expected: dict[str, Any], base: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        moved = np.linalg.norm(expected[name].astype(np.float64) - base[name])
        apart = np.linalg.norm(x.astype(np.float64) - expected[name])
        assert apart <= 2e-5 * moved, name
