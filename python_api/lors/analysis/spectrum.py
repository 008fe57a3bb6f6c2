"""The one number that says how many directions a difference has."""

from __future__ import annotations

__all__ = ["effective_rank"]


def effective_rank(energy: float, fourth: float) -> float:
    """(sum sigma^2)^2 / sum sigma^4, the participation ratio of the spectrum; 0 for a difference of zeros.

    1 for a single direction, k for k equal ones; what is far below the largest hardly counts.

    energy: sum sigma^2 = ||delta||^2. fourth: sum sigma^4 = ||delta.T delta||^2; so it takes a product and no SVD.
    """
    return energy * energy / fourth if fourth else 0.0
