"""Variations of LoRS that the experiment tries; none is a method of the package.

Each is put together from merges by the package's own methods: with W(m, lambda) the merge by method m,
W(svp, a) - W0 = a sum_t L_t on decomposed matrices and W(lors, 1) - W(svp, 1) = sum_t S_t, one expert at a time gives
L_t and S_t. Tensors that are not decomposed follow `rest` and `rest_lambda`, by default with the factor of L.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .merged import Merger

__all__ = ["VARIANTS", "weights"]

State = dict[str, Any]


def lors_scaled(merger: Merger, *, rank: int, density: float, low: float, sparse: float, **rest: Any) -> State:
    """W0 + low * sum L_t + sparse * sum S_t: a factor for each part instead of one for both."""
    merged = merger.weights("svp", {"rank": rank, "lam": low, **rest})
    return _plus(merged, _sparse(merger, rank, density, merger.experts), sparse)


def lors_elect(merger: Merger, *, rank: int, density: float, lam: float, **rest: Any) -> State:
    """LoRS, but an entry of S_t counts only where its sign is that of sum_t S_t (the election of TIES)."""
    import torch

    parts = [_sparse(merger, rank, density, {name: expert}) for name, expert in merger.experts.items()]
    elected = {}
    for name in parts[0]:
        stack = torch.stack([part[name] for part in parts])
        elected[name] = torch.where(stack.sign() == stack.sum(0).sign(), stack, 0).sum(0)
    return _plus(merger.weights("svp", {"rank": rank, "lam": lam, **rest}), elected, lam)


def lors_energy(merger: Merger, *, energy: float, density: float, lam: float, **rest: Any) -> State:
    """LoRS with a rank for each matrix: the least that holds `energy` of |delta|^2 on average over the experts."""
    import torch

    ranks = []
    for name in merger.matrices():
        deltas = torch.stack([expert[name] - merger.base[name] for expert in merger.experts.values()])
        squares = torch.linalg.svdvals(deltas).square()
        held = (squares.cumsum(-1) / squares.sum(-1, keepdim=True)).mean(0)
        ranks.append({"filter": name, "value": int((held < energy).sum()) + 1})
    return merger.weights("lors", {"rank": ranks, "density": density, "lam": lam, **rest})


def lors_orthogonal(merger: Merger, *, density: float, low: float, sparse: float, **rest: Any) -> State:
    """LoRS whose low-rank parts are made orthogonal to each other, as Task Singular Vectors does it.

    W0 + low * (TSV of the L_t) + sparse * sum S_t, with TSV's rank of int(min(m, n) / T) for T experts.
    """
    share = 1 / len(merger.experts)
    ranks = [{"filter": name, "value": int(min(merger.base[name].shape) * share)} for name in merger.matrices()]
    merged = merger.weights("tsv", {"lam": low, **rest})
    return _plus(merged, _sparse(merger, ranks, density, merger.experts), sparse)


def _sparse(merger: Merger, rank: Any, density: float, experts: Mapping[str, State]) -> State:
    """Sum of S_t over `experts`; zero for tensors that are not decomposed."""
    both = merger.weights("lors", {"rank": rank, "density": density, "lam": 1.0}, experts=experts)
    low = merger.weights("svp", {"rank": rank, "lam": 1.0}, experts=experts)
    return {name: both[name] - low[name] for name in both}


def _plus(state: State, change: State, factor: float) -> State:
    return {name: value + factor * change[name] for name, value in state.items()}


def weights(merger: Merger, method: str, setting: Mapping[str, Any], backend: str | None = None) -> State:
    """The merged weights by a variation, or by a method of the package."""
    variant = VARIANTS.get(method)
    return variant(merger, **setting) if variant else merger.weights(method, setting, backend)


VARIANTS: dict[str, Callable[..., State]] = {
    "lors_scaled": lors_scaled,
    "lors_elect": lors_elect,
    "lors_energy": lors_energy,
    "lors_orthogonal": lors_orthogonal,
}
