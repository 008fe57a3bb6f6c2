"""PEFT: our selection under its adapter merging, and adapters merged at the level of B @ A.

import lors.integrations.peft as bridge
with bridge.accelerate():
    model.add_weighted_adapter(["ca", "de"], [1.0, 1.0], "both", combination_type="ties", density=0.2)
bridge.add_lors_adapter(model, ["ca", "de"], [1.0, 1.0], "both", rank=7, density=0.2)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import LorsError, nearest
from ..experts.adapter import REFUSED
from .peers import Swap, largest_entries, peer

OLDEST = "0.10.0"
_swap = Swap("peft")


def accelerate() -> Swap:
    """Replaces PEFT's magnitude selection, wherever it is bound; a context manager, or `restore`.

    `prune`, `ties` and `magnitude_prune` of PEFT, and the combination types built on them, select through the one
    function that is replaced; `dare_linear` and `dare_ties` draw from torch's generator as before and have no selection.
    Results are the same but for ties: of equal magnitudes the first in row-major order are kept.
    """
    _peft()
    from peft.utils import merge_utils

    return _swap.accelerate({merge_utils.magnitude_based_pruning: _pruning(merge_utils.magnitude_based_pruning)})


def restore() -> None:
    """PEFT's own selection again."""
    _swap.restore()


def _peft() -> None:
    peer("peft", "peft", OLDEST, "peers")


def _pruning(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def magnitude_based_pruning(tensor: Any, density: float) -> Any:
        count = int(density * tensor.numel())
        kept = largest_entries(tensor, count) if 0 <= count <= tensor.numel() else None
        return theirs(tensor, density) if kept is None else kept

    return magnitude_based_pruning


# --- adapters merged at the level of B @ A ---------------------------------------------------------------------------


def add_lors_adapter(
    model: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    rank: int = 7,
    density: float = 0.0,
    *,
    adapter_rank: int | None = None,
) -> None:
    """Adds an adapter whose delta is sum_t weight_t (L_t + S_t), or its best approximation of rank `adapter_rank`.

    delta_t = scale_t B_t A_t of each adapter; L_t its `rank` largest singular triplets, taken from the factors by QR and
    never from the full matrix; S_t the int(density * numel) largest entries of what remains. Merging A and B on their own
    instead would create products of one expert's A with another's B.

    Args:
        model: a `PeftModel` or `LoraModel` that holds the adapters.
        adapters, weights: names and factors, one each.
        adapter_name: of the new adapter; must be new.
        rank: of every L_t, at least 1; more than an adapter has means all of it.
        density: in [0, 1]. With 0 the new adapter is exact.
        adapter_rank: of the new adapter [default: what sum_t L_t needs].

    Raises LorsError: unknown or unequal adapters, an adapter that is no plain LoRA, a name that is taken, bad numbers.
    """
    _peft()
    tuner = getattr(model, "base_model", model)
    _check(tuner, adapters, weights, adapter_name, rank, density, adapter_rank)
    layers = _lora_layers(tuner, adapters)
    ranks = {a: max(layer.r[a] for layer in layers if a in layer.r) for a in adapters}
    needed = sum(min(rank, ranks[a]) for a in adapters)
    _new_adapter(tuner, adapters, adapter_name, adapter_rank or needed)
    for layer in layers:
        _fill(layer, adapters, weights, adapter_name, rank, density, adapter_rank or needed)


def _check(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    rank: int,
    density: float,
    adapter_rank: int | None,
) -> None:
    known = getattr(tuner, "peft_config", None)
    if known is None:
        raise LorsError(f"model: expected a PEFT model with adapters, got {type(tuner).__name__}")
    if not adapters or len(adapters) != len(weights):
        raise LorsError(f"adapters, weights: expected as many of both, got {len(adapters)} and {len(weights)}")
    for name in adapters:
        if name not in known:
            raise LorsError(f"adapters: unknown adapter {name!r}{nearest(name, known)}")
        config = known[name]
        if problem := _more_than_lora(config):
            raise LorsError(f"adapters: {name!r}: expected a plain LoRA, got {problem}")
    if adapter_name in known:
        raise LorsError(f"adapter_name: {adapter_name!r} is already an adapter of the model")
    for what, value in (("rank", rank), ("adapter_rank", 1 if adapter_rank is None else adapter_rank)):
        if value < 1:
            raise LorsError(f"{what}: expected at least 1, got {value}")
    if not all(math.isfinite(weight) for weight in weights):
        raise LorsError(f"weights: expected finite numbers, got {list(weights)}")
    if not 0 <= density <= 1:
        raise LorsError(f"density: expected a number in [0, 1], got {density}")


def _more_than_lora(config: Any) -> str | None:
    """What an adapter has beside or instead of B @ A, which a merge of B @ A would lose."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return kind
    if getattr(config, "modules_to_save", None):
        return "one with whole modules (modules_to_save)"
    return next((meaning for key, meaning in REFUSED.items() if getattr(config, key, None)), None)


def _lora_layers(tuner: Any, adapters: Sequence[str]) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    layers = []
    for path, module in tuner.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if any(a in module.lora_embedding_A for a in adapters) or module.get_base_layer().weight.ndim != 2:
            raise LorsError(f"adapters: {path}: expected LoRA on linear layers, got {type(module).__name__}")
        if any(a in module.lora_A for a in adapters):
            layers.append(module)
    if not layers:
        raise LorsError(f"adapters: none of {', '.join(adapters)} has a layer in the model")
    return layers


def _new_adapter(tuner: Any, adapters: Sequence[str], name: str, rank: int) -> None:
    """An empty adapter of scale 1 on the union of the modules, frozen."""
    from dataclasses import replace

    first = tuner.peft_config[adapters[0]]
    targets = [tuner.peft_config[a].target_modules for a in adapters]
    if any(isinstance(target, str) for target in targets):
        union: Any = targets[0] if len(set(map(str, targets))) == 1 else "|".join(f"({_regex(t)})" for t in targets)
    else:
        union = set().union(*targets)
    tuner.peft_config[name] = replace(
        first, r=rank, lora_alpha=rank, target_modules=union, rank_pattern={}, alpha_pattern={}, use_rslora=False,
        init_lora_weights=True,
    )  # fmt: skip
    tuner.inject_adapter(tuner.model, name)
    for parameter_name, parameter in tuner.model.named_parameters():
        if f".{name}." in parameter_name or parameter_name.endswith(f".{name}"):
            parameter.requires_grad = False


def _regex(target: Any) -> str:
    import re

    return target if isinstance(target, str) else r"(.*\.)?(" + "|".join(map(re.escape, sorted(target))) + ")"


def _fill(
    layer: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    rank: int,
    density: float,
    adapter_rank: int,
) -> None:
    import torch

    from lors_kernels import truncated_svd

    from ..experts.factors import Factors

    parts, sparse = [], None
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter not in layer.lora_A or not weight:
            continue
        b, a = (x.weight.detach().float().cpu().numpy() for x in (layer.lora_B[adapter], layer.lora_A[adapter]))
        low, remaining = Factors(b * np.float32(layer.scaling[adapter]), a.T).split(rank)
        parts.append((np.float32(weight) * low.left, low.right))
        if density and remaining.rank:
            kept = remaining.largest(int(density * b.shape[0] * a.shape[1]))
            sparse = (0 if sparse is None else sparse) + np.float32(weight) * kept
    left, right = (np.concatenate([part[side] for part in parts], axis=1) for side in (0, 1))
    merged = Factors(left, right)
    if sparse is not None:
        full = merged.matrix() + sparse
        svd = truncated_svd(None, full, min(adapter_rank, *full.shape))
        merged = Factors(svd.left, svd.right)
    elif merged.rank > adapter_rank:
        merged = merged.split(adapter_rank)[0]
    for target, values in ((layer.lora_B[name].weight, merged.left), (layer.lora_A[name].weight, merged.right.T)):
        target.data.zero_()
        part = target.data[:, : merged.rank] if target is layer.lora_B[name].weight else target.data[: merged.rank]
        part.copy_(torch.from_numpy(np.ascontiguousarray(values)))
