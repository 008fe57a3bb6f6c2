"""Expert files, and how far merged models are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lors
from lors.checkpoints.reader import open_checkpoint
from lors.errors import LorsError
from lors.experts.decompose import decompose

EXPERTS = ("ca", "de", "es")


def files(family: dict[str, Path], into: Path, **options: Any) -> dict[str, str]:
    return {
        name: decompose(family["base"], family[name], into / f"{name}.lors.safetensors", name=name, **options).path
        for name in EXPERTS
    }


def state(path: Path | str) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> float:
    """||a - b|| / ||b - base||"""
    off = sum(float(((a[n].astype(np.float64) - b[n].astype(np.float64)) ** 2).sum()) for n in b)
    return float(
        (off / sum(float(((b[n].astype(np.float64) - base[n].astype(np.float64)) ** 2).sum()) for n in b)) ** 0.5
    )


def merged(family: dict[str, Path], out: Path, method: str, **settings: Any) -> Path:
    lors.merge(family["base"], {name: family[name] for name in ("ca", "de", "es")}, out, method, **settings)
    return out


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(LorsError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
