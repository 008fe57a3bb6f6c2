"""Files of statistics for matrices without a model: what `lors calibrate` would have written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lors.experts.statistics import write_statistics


def mean_square(n: int, seed: int, rows: int = 60) -> np.ndarray:
    """C of inputs that prefer some directions, [n, n]."""
    rng = np.random.default_rng([seed, n])
    x = rng.standard_normal((rows, n)) @ np.diag(rng.uniform(0.2, 2, n)) + 0.5 * rng.standard_normal(n)
    return x.T @ x / rows


def statistics(root: Path, names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Expert -> file, with an entry for every tensor of two dimensions; one that is there already is taken."""
    found = {}
    for seed, name in enumerate(names):
        path = root / f"{name}.stats.safetensors"
        if not path.exists():
            inputs = {tensor: tensor for tensor, shape in shapes.items() if len(shape) == 2}
            means = {tensor: mean_square(shape[-1], seed) for tensor, shape in shapes.items() if tensor in inputs}
            write_statistics(path, name, "made up", inputs, means)
        found[name] = str(path)
    return found
