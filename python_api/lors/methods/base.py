"""What a merge method is: the parameters it declares, and what it keeps of every expert's task vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..parameters import MethodSpec, ParameterSpec


class Reduction(NamedTuple):
    """weight * (L + S) of one matrix of one expert.

    L is the truncated SVD of delta with `rank` triplets (0: L = 0), S the int(density * numel) largest entries of what
    L leaves over (1: all of it).
    """

    weight: float
    rank: float = 0  # as the "rank" parameter: an integer, or below 1 a fraction of min(m, n)
    density: float = 1.0


# (parameters of each expert, parameters of the merge) for one tensor -> one Reduction per expert
Rule = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], "list[Reduction]"]


@dataclass(frozen=True)
class Method:
    """W = W0 + sum_t reduction_t(W_t - W0), tensor by tensor.

    reduce: the rule for the decomposed matrices; with `everywhere`, for all tensors. Without it the other tensors follow
        the recipe's `rest` with the weights that `reduce` gives.
    relative: False sums the models themselves instead of their differences to a base.
    """

    spec: MethodSpec
    reduce: Rule
    everywhere: bool = False
    relative: bool = True


WEIGHT = ParameterSpec("weight", "float", 1.0, help="factor of this expert")
LAMBDA = ParameterSpec("lambda", "float", 1.0, scope="global", help="factor of the sum over the experts")
RANK = ParameterSpec("rank", "rank", 7, help="singular triplets kept; below 1 a fraction of min(m, n)")
DENSITY = ParameterSpec("density", "float", 0.2, minimum=0.0, maximum=1.0, help="share of the entries kept")
