"""Model breadcrumbs with the sign election of TIES (arXiv 2312.06795)."""

from __future__ import annotations

from .sparsified import GAMMA, sparsified, without_outliers

METHOD = sparsified("breadcrumbs_ties", without_outliers, elect=True, normalize=False, rescale=False, own=(GAMMA,))
