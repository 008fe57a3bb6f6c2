"""FusionBench: our merges as one of its algorithms.

    fusion_bench method._target_=lors.integrations.fusion_bench.LoRSMerging method.rank=7 method.density=0.2 ...

FusionBench is imported with this module, because the algorithm is a class of its own kind; `import lors` does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import LorsError
from .peers import peer

peer("fusion_bench", "fusion-bench", "0.2.30", "peers")

from fusion_bench.method.base_algorithm import BaseAlgorithm  # noqa: E402
from fusion_bench.modelpool import BaseModelPool  # noqa: E402


class LoRSMerging(BaseAlgorithm):  # type: ignore[misc]
    """W = W0 + lambda * sum_t weight_t (L_t + S_t) over the models of a pool; any method of `lors.merge`.

    Args:
        method: "lors", "ties", "tsv", ...
        lam: lambda.
        weight: one number for all models, or model name -> number.
        settings: further parameters of the method, and `target`, `rest`, `seed`, as for `lors.merge_state_dicts`.

    The pool's pretrained model is the base and is changed in place, as FusionBench's own algorithms do it.
    """

    def __init__(
        self,
        method: str = "lors",
        lam: float | None = None,
        weight: float | Mapping[str, float] | None = None,
        **settings: Any,
    ) -> None:
        self.method, self.lam, self.weight = method, lam, weight
        self.settings = {key: _plain(value) for key, value in settings.items() if not key.startswith("_")}
        super().__init__()

    def run(self, modelpool: Any) -> Any:
        """Merges the pool; LorsError for parameters or models that do not fit."""
        from ..merging.in_memory import merge_state_dicts

        pool = modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)
        if not pool.has_pretrained:
            raise LorsError("modelpool: expected a pretrained model (_pretrained_), got none")
        model = pool.load_pretrained_model()
        experts = {name: _state(pool.load_model(name)) for name in pool.model_names}
        config = getattr(model, "config", None)
        merged = merge_state_dicts(
            _state(model),
            experts,
            self.method,
            config=config.to_dict() if hasattr(config, "to_dict") else None,
            **{"lam": self.lam, "weight": _plain(self.weight)} | self.settings,
        )
        model.load_state_dict(merged)
        return model


def _state(model: Any) -> dict[str, Any]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def _plain(value: Any) -> Any:
    """Python data of what a command line gives (an OmegaConf container)."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
