"""The least interference with every expert's inputs, in closed form (WUDI, arXiv 2503.08099; with a ridge 2604.01329).

    G_t = delta_t^T delta_t / ||delta_t||_F^2,     [n, n]: what expert t has learned to read
    X = argmin sum_t ||(X - w_t delta_t) delta_t^T||_F^2 / ||delta_t||_F^2 + eps ||X - P||_F^2
      = (sum_t w_t delta_t G_t + eps P) (sum_t G_t + eps I)^-1,     eps = ridge * tr(sum_t G_t) / n
    W = W0 + lambda * X

P is the sum of w_t delta_t, or their mean. n is the side of a layer's inputs. What is kept are the sums, [n, n] and two of [m, n],
whatever the number of experts: they are float32, and so is the division unless the ridge is below n 2^-17. Experts of weight 0 are
left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lors_kernels.dense import ridge_quotient

from ..recipes.parameters import LARGEST, MethodSpec, ParameterSpec
from .base import LAMBDA, WEIGHT, Method, whole
from .operands import Combination, Operands

RIDGE = ParameterSpec(
    "ridge", "float", 0.3, minimum=1e-3, scope="global", help="how much weighs P, in mean eigenvalues of the sum of G"
)
TOWARDS = ParameterSpec(
    "towards",
    "str",
    "sum",
    scope="global",
    choices=("sum", "mean"),
    help="P: the sum of the task vectors, or their mean",
)
SMALLEST = 2.0**-126  # of what float32 holds to its full precision
BLOCK = 512  # columns of a triangle that are computed together
SINGLE = 2.0**-17  # of the trace: where eps is less, rounding in the division would be more of it than in the sums


def combine(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Combination:
    weights = {t: model["weight"] for t, model in enumerate(models) if model["weight"]}

    def update(operands: Operands) -> Any:
        """lambda * X, or None where no expert differs from the base."""
        import torch

        m, n = operands.spec.shape
        gram: Any = None
        for t, weight in weights.items():
            delta = operands.difference(t)
            length = torch.linalg.vector_norm(delta, dtype=torch.float64)
            operands.check(t, length)
            if not (norm := float(length)):
                continue
            # of length 1, so that products neither over- nor underflow
            unit = delta.div_(norm) if SMALLEST < norm < LARGEST else (delta.double() / norm).float()
            if gram is None:
                gram, product, total = unit.new_zeros(n, n), torch.zeros_like(unit), torch.zeros_like(unit)
            total.add_(unit, alpha=weight * norm)
            if m < n:  # delta G_t the other way round, of the smaller Gram matrix
                for start in range(0, n, BLOCK):  # the lower triangle is all that is read
                    gram[start:, start : start + BLOCK].addmm_(unit[:, start:].T, unit[:, start : start + BLOCK])
                product.addmm_(unit @ unit.T, unit, alpha=weight * norm)
            else:  # all of it: half, in strips narrow enough to spare the rest, was no faster
                own = unit.T @ unit
                gram.add_(own)
                product.addmm_(unit, own, alpha=weight * norm)
        if gram is None:
            return None
        goal = total if shared["towards"] == "sum" else total.div_(len(weights))
        if shared["ridge"] < n * SINGLE:
            product, gram, goal = product.double(), gram.double(), goal.double()
        return shared["lambda"] * ridge_quotient(product, gram, goal, shared["ridge"])

    return whole(update)


METHOD = Method(
    MethodSpec("wudi", (WEIGHT, RIDGE, TOWARDS, LAMBDA), rest="average"), combine=combine, combines_on_device=True
)
