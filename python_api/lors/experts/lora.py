"""The low-rank part of an expert file as a PEFT LoRA adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..checkpoints.writer import WeightWriter
from ..errors import LorsError, SettingError
from ..files.directory import OutputDirectory
from ..public import public
from ..recipes.parameters import LARGEST
from .expert_source import open_expert

__all__ = ["export_lora"]


def export_lora(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    scale: float = 1.0,
    force: bool = False,
) -> int:
    """Writes L as a PEFT LoRA adapter: W + scale * L = W + (alpha / r) B @ A with B = left, A = right.T.

    base: what PEFT shall call the base model (the adapter's base_model_name_or_path). Returns the number of matrices.
    """
    if not abs(scale) <= LARGEST:
        raise SettingError("scale", f"expected a number that float32 can hold, got {scale:g}")
    source = open_expert(path)
    with source.checkpoint, OutputDirectory(out, force=force, inputs=[path]) as directory:
        matrices = [part for part in source.layout.parts if part.matrix and part.rank and part.name.endswith(".weight")]
        if not matrices:
            raise LorsError(f"{path}: there is no low-rank part in it")
        modules = {part.name.removesuffix(".weight"): part for part in matrices}
        specs = []
        for module, part in modules.items():
            specs.append((f"base_model.model.{module}.lora_A.weight", np.dtype(np.float32), (part.rank, part.shape[1])))
            specs.append((f"base_model.model.{module}.lora_B.weight", np.dtype(np.float32), (part.shape[0], part.rank)))
        with WeightWriter(directory.path, specs, stem="adapter_model", shard_bytes=2**63) as writer:
            for module, part in modules.items():
                left, right = source.stored_factors(part.name)
                writer.write(f"base_model.model.{module}.lora_A.weight", np.ascontiguousarray(right.T))
                writer.write(f"base_model.model.{module}.lora_B.weight", left)
            writer.finish()
        ranks = {module: part.rank for module, part in modules.items()}
        config = _adapter_config(ranks, None if base is None else public(base), scale)
        directory.write_text("adapter_config.json", json.dumps(config, indent=2) + "\n")
        directory.commit()
    return len(modules)


def _adapter_config(ranks: Mapping[str, int], base: str | None, scale: float) -> dict[str, Any]:
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    odd = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual * scale,
        "rank_pattern": odd,
        "alpha_pattern": {module: rank * scale for module, rank in odd.items()},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }
