"""What an expert's layers read, in one small file: C = mean of x x^T over the inputs x of a linear layer.

A safetensors file. Metadata `lors.statistics`, JSON: format (1), name, data (in words), inputs (tensor -> key, layers that read the
same share a key). Per key of n inputs: `KEY:variance` float32 [n], the diagonal of C, and `KEY:lower` float16 [n (n - 1) / 2], below it
and row by row C_ij / sqrt(C_ii C_jj), which lies in [-1, 1]: within 2^-12 of what it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.reader import open_checkpoint
from ..checkpoints.writer import WeightWriter
from ..errors import LorsError, nearest
from ..files.file import OutputFile
from ..files.replaceable import STATISTICS
from ..files.strict_json import parse

__all__ = ["read_statistics", "require_statistics", "write_statistics"]

KEY = "lors.statistics"


def write_statistics(
    out: Path, name: str, data: str, inputs: Mapping[str, str], means: Mapping[str, np.ndarray], force: bool = False
) -> None:
    """inputs: tensor -> key. means: key -> C [n, n]."""
    text = json.dumps({"format": 1, "name": name, "data": data, "inputs": dict(inputs)})
    arrays: dict[str, np.ndarray] = {}
    for key, mean in means.items():
        variance = np.diagonal(mean).astype(np.float64)
        scale = np.sqrt(np.where(variance > 0, variance, 1.0))
        arrays[f"{key}:variance"] = variance.astype(np.float32)
        arrays[f"{key}:lower"] = (mean / scale / scale[:, None])[np.tri(len(mean), k=-1, dtype=bool)].astype(np.float16)
    with OutputFile(out, STATISTICS, force=force) as file:
        layout = [(key, array.dtype, array.shape) for key, array in arrays.items()]
        with WeightWriter(
            file.path.parent, layout, metadata={KEY: text}, shard_bytes=2**63, stem=file.path.stem
        ) as writer:
            for key, array in arrays.items():
                writer.write(key, array.ravel())
            writer.finish()
        file.commit()


def require_statistics(path: str) -> None:
    """LorsError unless there is such a file; what is in it is looked at when it is read."""
    if not Path(path).is_file():
        raise LorsError(f"{path}: expected a file of statistics, there is none")


def read_statistics(path: str, tensor: str, shape: tuple[int, ...]) -> np.ndarray:
    """C [n, n] float64 of the inputs of a tensor [m, n]; LorsError unless the file has it."""
    require_statistics(path)
    with open_checkpoint(path) as file:
        if KEY not in file.metadata:
            raise LorsError(f"{path}: expected statistics, as `lors calibrate` writes them")
        content: Any = parse(file.metadata[KEY], f"{path}: the metadata of statistics")
        inputs = content.get("inputs") if isinstance(content, dict) and content.get("format") == 1 else None
        if not isinstance(inputs, dict):
            raise LorsError(f"{path}: expected statistics of format 1")
        if tensor not in inputs:
            raise LorsError(f"{path}: expected statistics of tensor {tensor!r}, it has none{nearest(tensor, inputs)}")
        names = [f"{inputs[tensor]}:{part}" for part in ("variance", "lower")]
        n = shape[-1]
        for name, size in zip(names, (n, n * (n - 1) // 2), strict=True):
            if name not in file.tensors or file.tensors[name].shape != (size,):
                raise LorsError(f"{path}: {name}: expected {size} values for tensor {tensor!r} {list(shape)}")
        variance, below = (file.read(name).astype(np.float64) for name in names)
    if not (np.isfinite(below).all() and (variance >= 0).all() and np.isfinite(variance).all()):
        raise LorsError(f"{path}: {inputs[tensor]}: expected finite values and variances of at least 0")
    mean = np.zeros((n, n))
    mean[np.tri(n, k=-1, dtype=bool)] = below
    mean += mean.T
    scale = np.sqrt(variance)
    mean *= scale
    mean *= scale[:, None]
    np.fill_diagonal(mean, variance)
    return mean
