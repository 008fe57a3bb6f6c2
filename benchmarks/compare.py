"""Do two merged checkpoints say the same? Measured in the same run as their times."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .errors import BenchmarkError


def difference(ours: Path, theirs: Path, base: Path) -> dict[str, float]:
    """How far two merges are apart, relative to how far they went from the base.

        || ours - theirs ||_F / || theirs - base ||_F       over all tensors, and the largest |ours - theirs|

    Directories with one model.safetensors each, or several shards. Different tensor names raise BenchmarkError.
    """
    import torch

    apart = moved = largest = 0.0
    with ExitStack() as stack:
        mine, other, origin = (open_tensors(path, stack) for path in (ours, theirs, base))
        if mine.keys() != other.keys():
            names = ", ".join(sorted(mine.keys() ^ other.keys())[:3])
            raise BenchmarkError(
                f"{ours.name} and {theirs.name}: expected the same tensors, got a difference in {names}"
            )
        for name in mine:
            left, right, start = (file[name].get_tensor(name).to(torch.float64) for file in (mine, other, origin))
            apart += float((left - right).square().sum())
            moved += float((right - start).square().sum())
            largest = max(largest, float((left - right).abs().max()))
    return {"relative": (apart / moved) ** 0.5, "largest": largest}


def open_tensors(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> the open safetensors file that holds it."""
    from safetensors import safe_open

    tensors: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        file = stack.enter_context(safe_open(path, framework="pt"))
        tensors |= dict.fromkeys(file.keys(), file)
    if not tensors:
        raise BenchmarkError(f"{directory.name}: expected a .safetensors file, got none")
    return tensors
