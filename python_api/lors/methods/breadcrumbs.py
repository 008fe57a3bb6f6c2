"""Model breadcrumbs: leave out the smallest entries and the very largest, then task arithmetic (arXiv 2312.06795)."""

from __future__ import annotations

from .sparsified import GAMMA, sparsified, without_outliers

METHOD = sparsified("breadcrumbs", without_outliers, elect=False, normalize=False, rescale=False, own=(GAMMA,))
