"""Spectra of the task vectors that an experiment trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import Config

__all__ = ["spectra"]

_RANKS = (1, 2, 4, 8, 16)
_MATRICES = 16  # per expert, spread over the depth: enough for a mean, seconds for a large model


def spectra(config: Config, stages: Mapping[str, Path]) -> dict[str, Any]:
    """Per expert of the first seed: share of |delta|^2 in r triplets, sigma_{r+1} / sigma_r, share in matrices."""
    import numpy as np

    from ...checkpoints.layers import decomposed
    from ...checkpoints.reader import open_checkpoint
    from ..model.whisper import resolve_model

    found = {}
    with open_checkpoint(resolve_model(config.base)) as base:
        matrices = sorted(decomposed({n: t.shape for n, t in base.tensors.items()}, base.naming, base.config))
        sampled = matrices[:: max(1, len(matrices) // _MATRICES)]
        for chosen in config.trained():
            with open_checkpoint(stages[f"expert-{chosen.name}-s{config.seeds[0]}"] / "model") as expert:

                def delta(name: str, expert: Any = expert) -> Any:
                    return expert.read(name).astype(np.float32) - base.read(name).astype(np.float32)

                energy = {name: float(np.square(delta(name)).sum()) for name in base.tensors}
                values = [np.linalg.svd(delta(n).reshape(base.tensors[n].shape), compute_uv=False) for n in sampled]
            kept = [np.cumsum(v**2) / np.sum(v**2) for v in values if v.any()]
            ratios = [v[1:] / v[:-1] for v in values if v.any()]
            found[chosen.name] = {
                "energy": {str(r): float(np.mean([k[r - 1] for k in kept])) for r in _RANKS if r <= len(values[0])},
                "ratio": {str(r): float(np.mean([q[r - 1] for q in ratios])) for r in _RANKS if r < len(values[0])},
                "matrices_share": sum(energy[name] for name in matrices) / (sum(energy.values()) or 1.0),
            }
    return found
