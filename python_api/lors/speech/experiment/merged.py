"""Merges in memory for the experiment: experts read once, any number of settings tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoints.layers import decomposed
from ...merging.in_memory import merge_state_dicts
from ...methods import METHODS
from ..model.whisper import load_model, load_processor

__all__ = ["Merger", "has_rest", "with_rest"]


def has_rest(method: str) -> bool:
    """Whether it leaves tensors to a recipe's `rest`, or would; variations do."""
    return method not in METHODS or METHODS[method].targets


def with_rest(method: str, setting: Mapping[str, Any], rest: str) -> dict[str, Any]:
    """The setting as a merge takes it: with this treatment of what is not decomposed, unless the method treats all tensors
    alike and no `rest_lambda` parts them."""
    plain = {name: value for name, value in setting.items() if name != "rest"}
    alike = method in METHODS and METHODS[method].everywhere and "rest_lambda" not in setting
    return plain if alike or not has_rest(method) else {**plain, "rest": rest}


@dataclass(frozen=True)
class Merger:
    """Base and experts as float32 state dicts, and a network that takes a merge's weights."""

    base: dict[str, Any]
    experts: dict[str, dict[str, Any]]
    network: Any
    processor: Any

    @classmethod
    def load(cls, base: str, inputs: Mapping[str, Path], device: str, dtype: str = "float32") -> Merger:
        """`inputs`: stage name -> directory; those named ``expert-...`` hold ``model``. `dtype`: of the network, not of the merge."""
        experts = {name: _weights(path / "model") for name, path in inputs.items() if name.startswith("expert-")}
        return cls(_weights(base), experts, load_model(base, device=device, dtype=dtype), load_processor(base))

    def holding(self, weights: Mapping[str, Any]) -> Any:
        """The network with these weights; the same object every time."""
        tied = self.network.load_state_dict(weights, strict=False)
        if tied.unexpected_keys or tied.missing_keys != ["proj_out.weight"]:
            raise RuntimeError(f"the merge does not fit the network: {tied}")
        return self.network

    def weights(
        self,
        method: str,
        setting: Mapping[str, Any],
        backend: str | None = None,
        experts: Mapping[str, dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """The merged state dict, of all experts or of `experts`."""
        chosen = self.experts if experts is None else experts
        config = self.network.config.to_dict()
        return merge_state_dicts(self.base, chosen, method, config=config, backend=backend, threads=1, **setting)

    def matrices(self) -> list[str]:
        """Names of the matrices that are decomposed."""
        return sorted(decomposed({name: tuple(value.shape) for name, value in self.base.items()}))


def _weights(source: str | Path) -> dict[str, Any]:
    state = load_model(source).state_dict()
    state.pop("proj_out.weight")  # tied to the embedding; files do not hold it either
    return dict(state)
