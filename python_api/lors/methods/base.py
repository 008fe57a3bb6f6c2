"""What a merge method is: the parameters it declares, and what it does with the task vectors of one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from lors_kernels.precision import full_precision
from lors_kernels.threads import one_torch_thread

from ..recipes.parameters import BOOST, BOOST_MERGED, REST_LAMBDA, MethodSpec, ParameterSpec, Rest
from .operands import Combination, Operands

if TYPE_CHECKING:
    from torch import Tensor


class Reduction(NamedTuple):
    """weight * (L + S) of one matrix of one expert.

    L is the truncated SVD of delta with `rank` triplets (0: L = 0), S the int(density * numel) largest entries of what
    L leaves over (1: all of it).
    """

    weight: float
    rank: float = 0  # as the "rank" parameter: an integer, or below 1 a fraction of min(m, n)
    density: float = 1.0


Parameters: TypeAlias = "Mapping[str, Any]"
Reduce: TypeAlias = "Callable[[Sequence[Parameters], Parameters], list[Reduction]]"
Combine: TypeAlias = "Callable[[Sequence[Parameters], Parameters], Combination]"


@dataclass(frozen=True)
class Method:
    """One of two forms, for one tensor, from (parameters of each expert, parameters of the merge):

    reduce: W = W0 + sum_t reduction_t(W_t - W0), one `Reduction` per expert; each is done while its matrix is in cache.
    combine: anything that needs all experts together, a `Combination` that is given `Operands`.

    everywhere: all floating tensors are treated so, unless the recipe has a `target` or says something of the rest; else the
        projection matrices. The other tensors follow the recipe's `rest`, see `rest_of`.
    targets: whether the recipe may have a `target` and a `rest`.
    relative: False sums the models themselves instead of their differences to a base.
    separable: the result is a sum of one term per expert, linear in lambda, and no term depends on the other experts
        (unless the weights are normalized): an expert can be added and taken out, and lambda changed, afterwards.
    combines_on_device: whether `combine` works on tensors that are on a GPU; what `reduce` says always does.
    """

    spec: MethodSpec
    reduce: Reduce | None = None
    combine: Combine | None = None
    everywhere: bool = False
    targets: bool = True
    relative: bool = True
    separable: bool = False
    combines_on_device: bool = False

    @property
    def on_device(self) -> bool:
        return self.combine is None or self.combines_on_device

    def complete(self) -> Method:
        """The same with the parameters that every method has."""
        common = COMMON if self.targets else ()
        return replace(self, spec=replace(self.spec, parameters=(*self.spec.parameters, *common)))

    def treatment(self, models: Sequence[Parameters], shared: Parameters) -> list[Reduction] | Combination:
        if self.combine is not None:
            return self.combine(models, shared)
        assert self.reduce is not None
        return self.reduce(models, shared)


def whole(update: Callable[[Operands], Tensor | None]) -> Combination:
    """W = W0 + update, of a matrix as a whole; None leaves the base. In one thread of torch, without TF32."""

    def merge(operands: Operands) -> Iterator[tuple[int, Any]]:
        with one_torch_thread(), full_precision():
            found = update(operands)
            moved = operands.out(operands.base()) if found is None else operands.moved(found)
        yield 0, moved

    return merge


def rest_of(rule: Rest, models: Sequence[Parameters], shared: Parameters) -> list[Reduction]:
    """W = W0 + mu * sum_t w_t delta_t of a tensor that the method does not treat; "average": W0 + mu * mean_t(delta_t);
    "base": W0. mu is `rest_lambda`, and where that is not given lambda, of an average 1."""
    if rule == "base":
        return []
    factor = shared.get(REST_LAMBDA)
    if rule == "average":
        return [Reduction((1.0 if factor is None else factor) / len(models)) for _ in models]
    factor = shared.get("lambda", 1.0) if factor is None else factor
    return [Reduction(factor * model.get("weight", 1.0)) for model in models]


WEIGHT = ParameterSpec("weight", "float", 1.0, help="factor of this expert")
LAMBDA = ParameterSpec("lambda", "float", 1.0, scope="global", help="factor of the sum over the experts")
RANK = ParameterSpec("rank", "rank", 7, help="singular triplets kept; below 1 a fraction of min(m, n)")
DENSITY = ParameterSpec("density", "float", 0.2, minimum=0.0, maximum=1.0, help="share of the entries kept")
COMMON = (
    ParameterSpec(
        REST_LAMBDA, "float", None, scope="global",
        help="factor of the tensors that are not treated (default: lambda; 1 where they are averaged)",
    ),
    ParameterSpec(
        BOOST, "float", None, minimum=0.0, maximum=1.0,
        help="of this expert's matrices: no singular value below the one at which their sum reaches this share",
    ),
    ParameterSpec(
        BOOST_MERGED, "float", None, minimum=0.0, maximum=1.0, scope="global", help="the same of the merged difference",
    ),
)  # fmt: skip
INT8_MASK = ParameterSpec(
    "int8_mask", "bool", False, scope="global", help="accepted for mergekit's sake: there are no masks in memory here"
)
