"""Grouped operations by a loop over the pairs, for the backends that work a matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ..group import GroupKeepStats, GroupStats, GroupThreshold, MatrixGroup
from ..types import Consensus, Keep, KeepStats, NonFiniteError, Threshold


class Loop:
    width = 8  # block width of the Krylov iteration

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.name: str = module.NAME

    def gram_apply(self, group: MatrixGroup, x: Any, *, side: str, product: bool = False) -> tuple[Any, Any]:
        """z, and the inner product delta @ x (delta.T @ x for "left") if asked for."""
        import torch

        z, y = [], []
        for (base, tuned), x_p in zip(group.each(), x, strict=True):
            z.append(self.module.gram_apply(base, tuned, x_p, side=side))
            if product:
                delta = tuned.float() if base is None else tuned.float() - base.float()
                y.append((delta if side == "right" else delta.T) @ x_p)
        return torch.stack(z), torch.stack(y) if product else None

    def first_pass(self, group: MatrixGroup, x: Any, *, side: str) -> tuple[Any, Any, Any, Any]:
        """z of `gram_apply`, and what `measure` says."""
        return self.gram_apply(group, x, side=side)[0], *self.measure(group)

    def measure(self, group: MatrixGroup) -> tuple[Any, Any, Any]:
        """Per pair: the sum of delta^2 (float64), its NaN and infinite entries, its largest finite magnitude."""
        import torch

        energy, bad, top = [], [], []
        for base, tuned in group.each():
            delta = tuned.float() if base is None else tuned.float() - base.float()
            finite = torch.isfinite(delta)
            energy.append(delta.double().square().sum())
            bad.append((~finite).sum())
            top.append(torch.where(finite, delta, 0).abs().amax())
        return torch.stack(energy), torch.stack(bad), torch.stack(top)

    def residual_threshold(self, group: MatrixGroup, left: Any, right: Any, k: int) -> GroupThreshold:
        found, bad = [], []
        for p, (base, tuned) in enumerate(group.each()):
            factors = (None, None) if left is None else (left[p], right[p])
            try:
                found.append(self.module.residual_threshold(base, tuned, *factors, k))
                bad.append(0)
            except NonFiniteError as error:
                found.append(Threshold(float("inf"), 0, 0))
                bad.append(error.count)
        thresholds = GroupThreshold.of(found, group.device)
        return thresholds._replace(non_finite=thresholds.ties.new_tensor(bad))

    def merge_update(
        self,
        group: MatrixGroup,
        out: Sequence[Any],
        left: Any,
        right: Any,
        threshold: GroupThreshold,
        weight: list[float],
    ) -> GroupStats:
        import torch

        thresholds, stats, count = threshold.thresholds(), [], group.experts
        for i in range(group.matrices):
            span = range(i * count, (i + 1) * count)
            stats += self.module.merge_update(
                out[i],
                None if group.bases is None else group.bases[i],
                group.tuned[i],
                [None if left is None else left[p] for p in span],
                [None if right is None else right[p] for p in span],
                [thresholds[p] for p in span],
                [weight[p] for p in span],
            )
        energy = torch.tensor([s[:3] for s in stats], dtype=torch.float64, device=group.device)
        counts = torch.tensor([s[3:] for s in stats], dtype=torch.int64, device=group.device)
        return GroupStats(energy, counts[:, 0], counts[:, 1])

    def ties_update(
        self, group: MatrixGroup, out: Sequence[Any] | None, keep: list[Keep], weight: list[float], rule: Consensus
    ) -> GroupKeepStats:
        import torch

        stats, count = list[KeepStats](), group.experts
        for i in range(group.matrices):
            stats += self.module.ties_update(
                None if out is None else out[i],
                None if group.bases is None else group.bases[i],
                group.tuned[i],
                keep[i * count : (i + 1) * count],
                weight,
                rule,
            )
        sums = torch.tensor([s[:4] for s in stats], dtype=torch.float64, device=group.device)
        counts = torch.tensor([s[4:] for s in stats], dtype=torch.int64, device=group.device)
        return GroupKeepStats(sums, counts[:, 0], counts[:, 1])
