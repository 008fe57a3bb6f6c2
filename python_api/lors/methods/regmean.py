"""RegMean: the matrix whose outputs are nearest to every expert's on what that expert reads (arXiv 2212.09849).

    C_t = mean of x x^T over the inputs x of the layer in expert t, its entries off the diagonal times alpha
    X = argmin sum_t E ||(X - w_t delta_t) x_t||^2 + eps ||X - P||_F^2
      = (sum_t w_t delta_t C_t + eps P) (sum_t C_t + eps I)^-1,     eps = ridge * tr(sum_t C_t) / n
    W = W0 + lambda * X

P is the mean of w_t delta_t: it decides where the inputs never go. The C_t are those of `statistics`, files that `lors calibrate`
writes; made with its option --plus they are those of RegMean++ (arXiv 2508.03121), from the layers of the merged model. Experts of
weight 0 are left out. What is kept are sums, whatever the number of experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lors_kernels.dense import ridge_quotient

from ..errors import LorsError
from ..experts.statistics import read_statistics, require_statistics
from ..recipes.parameters import MethodSpec, ParameterSpec
from .base import LAMBDA, WEIGHT, Method, whole
from .operands import Combination, Operands

STATISTICS = ParameterSpec("statistics", "path", help="file of `lors calibrate` for this expert")
ALPHA = ParameterSpec(
    "alpha", "float", 0.9, minimum=0.0, maximum=1.0, scope="global", help="factor of C's entries off the diagonal"
)
RIDGE = ParameterSpec(
    "ridge", "float", 1e-4, minimum=1e-6, scope="global", help="how much weighs P, in mean eigenvalues of the sum of C"
)


def combine(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Combination:
    chosen = [(t, model["weight"], model["statistics"]) for t, model in enumerate(models) if model["weight"]]
    for _, _, path in chosen:
        require_statistics(path)

    def update(operands: Operands) -> Any:
        import torch

        if not chosen:
            return None
        gram: Any = None
        product: Any = 0.0
        total: Any = 0.0
        for t, weight, path in chosen:
            delta = weight * operands.delta(t)
            mean = torch.from_numpy(read_statistics(path, operands.name, operands.spec.shape)).to(delta.device)
            shrink(mean, shared["alpha"])
            product, total = product + delta @ mean, total + delta
            gram = mean if gram is None else gram.add_(mean)
        try:
            return shared["lambda"] * ridge_quotient(product, gram, total / len(chosen), shared["ridge"])
        except torch.linalg.LinAlgError:
            raise LorsError(
                f"tensor {operands.name!r}: expected a sum of statistics that has an inverse; choose a larger ridge "
                f"than {shared['ridge']:g}"
            ) from None

    return whole(update)


def shrink(mean: Any, alpha: float) -> None:
    """The entries off the diagonal times alpha, in place."""
    variance = mean.diagonal().clone()
    mean.mul_(alpha).diagonal().copy_(variance)


METHOD = Method(
    MethodSpec("regmean", (WEIGHT, STATISTICS, ALPHA, RIDGE, LAMBDA), rest="average"),
    combine=combine, combines_on_device=True,
)  # fmt: skip
