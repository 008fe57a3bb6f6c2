"""Low-rank and sparse parts with a weight for each; the low-rank ones made orthogonal to each other, as in `tsv`.

    L_t = U_t S_t V_t^T, the `rank` largest triplets of delta_t,     R_t = delta_t - L_t
    W = W0 + lambda * (P diag(w_1 S_1 .. w_T S_T) Q^T + sum_t s_t keep(R_t)),     P = polar([U_1 .. U_T]), Q = polar([V_1 .. V_T])

keep(R) has the int(density * m n) largest entries, s_t is `sparse_weight`, and without a rank it is int(min(m, n) / T) for T
experts. `orthogonal: false` puts sum_t w_t L_t in the place of the first term. All is linear in the weights, so an expert of weight 0
counts as one of the T, and keeps its directions free: `lors learn` finds weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lors_kernels import UpdateStats
from lors_kernels.lors_delta import add_lors_delta

from ..errors import SettingError
from ..recipes.parameters import MethodSpec, ParameterSpec, rank_of
from .base import DENSITY, LAMBDA, WEIGHT, Method, whole
from .operands import Combination, Operands, Outcome
from .tsv import TOLERANCE, Decorrelated, decorrelated, rank_of_each

RANK = ParameterSpec(
    "rank", "rank", None, help="singular triplets kept (default: min(m, n) over the number of experts)"
)
SPARSE_WEIGHT = ParameterSpec("sparse_weight", "float", 0.2, help="factor of this expert's sparse part")
ORTHOGONAL = ParameterSpec(
    "orthogonal", "bool", True, scope="global", help="make the low-rank parts of the experts orthogonal to each other"
)


def combine(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Combination:
    def update(operands: Operands) -> Any:
        import torch

        found = low_rank_parts(operands, ranks_of(operands, models), shared["orthogonal"])
        scaled = [model["weight"] * sigma for model, (_, sigma, _) in zip(models, found.triplets, strict=True)]
        total = (found.left * torch.cat(scaled)).float() @ found.right.float().T
        for t, (model, (u, sigma, v)) in enumerate(zip(models, found.triplets, strict=True)):
            if model["sparse_weight"]:
                residual = operands.difference(t) - (u * sigma).float() @ v.float().T
                add_kept(operands, total, residual, model["density"], model["sparse_weight"])
        return shared["lambda"] * total

    return whole(update)


def ranks_of(operands: Operands, models: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    try:
        return {
            t: rank_of(model["rank"], *operands.spec.shape) if "rank" in model else rank_of_each(operands, len(models))
            for t, model in enumerate(models)
        }
    except ValueError as error:
        problem = str(error).removeprefix("rank: ")
        raise SettingError("parameters.rank", f"{problem}: tensor {operands.name!r}") from None


def low_rank_parts(operands: Operands, ranks: Mapping[int, int], orthogonal: bool) -> Decorrelated:
    import torch

    if orthogonal:
        return decorrelated(operands, ranks)
    triplets = [operands.svd(t, rank, TOLERANCE) for t, rank in ranks.items()]
    left, right = (torch.cat([found[side] for found in triplets], dim=1) for side in (0, 2))
    return Decorrelated(triplets, left, right)


def add_kept(operands: Operands, total: Any, residual: Any, density: float, weight: float) -> None:
    """total += weight * keep(residual), and its account."""
    stats, _ = add_lors_delta(total, None, residual, 0, density, weight, **operands.kernels)
    operands.outcomes.append(Outcome(UpdateStats(0.0, 0.0, stats.kept_energy, stats.kept, 0)))


# as in tsv: lambda wants to be about 1
METHOD = Method(
    MethodSpec("lors_parts", (RANK, DENSITY, WEIGHT, SPARSE_WEIGHT, ORTHOGONAL, LAMBDA), rest="average"),
    combine=combine, combines_on_device=True,
)  # fmt: skip
