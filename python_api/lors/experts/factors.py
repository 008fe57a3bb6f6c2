"""A delta that is known by its factors, as a LoRA adapter gives it: left @ right.T, never multiplied out to be decomposed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np

from lors_kernels.arrays import is_torch
from lors_kernels.precision import full_precision


class Factors(NamedTuple):
    """delta = left @ right.T. Arrays, or for `matrix` tensors on a device too."""

    left: Any  # [m, r] float32
    right: Any  # [n, r] float32
    known: tuple[Any, Any, Any] | None = None  # what `svd` gives, where it is

    @property
    def rank(self) -> int:
        return int(self.left.shape[1])

    def matrix(self, start: int = 0, stop: int | None = None) -> Any:
        """Rows [start, stop) of delta in float32."""
        with full_precision() if is_torch(self.left) else nullcontext():
            return self.left[start:stop] @ self.right.T

    def exact(self) -> Any:
        """delta in float64."""
        if self.known is not None:
            u, sigma, v = self.known
            return (u * sigma) @ v.T
        return self.left.astype(np.float64) @ self.right.astype(np.float64).T  # type: ignore[no-any-return]

    def flat(self, start: int, stop: int) -> np.ndarray:
        """Row-major entries [start, stop) of delta in float32."""
        n = len(self.right)
        first = start // n
        return self.matrix(first, -(-stop // n)).ravel()[start - first * n : stop - first * n]  # type: ignore[no-any-return]

    def sigma(self) -> np.ndarray:
        """The singular values of delta, float64, largest first."""
        return self.svd()[1]

    def split(self, rank: int) -> tuple[Factors, Factors]:
        """(L, delta - L) with L the `rank` largest singular triplets: left singular vectors times values, and right ones."""
        u, sigma, v = self.svd()
        left = (u * sigma).astype(np.float32)
        right = v.astype(np.float32)
        cut = min(rank, len(sigma))
        return Factors(left[:, :cut], right[:, :cut]), Factors(left[:, cut:], right[:, cut:])

    def largest(self, k: int) -> np.ndarray:
        """The k largest entries of delta, zeros elsewhere, as `residual_threshold` selects them."""
        import lors_kernels

        full = self.matrix()
        out = np.zeros_like(full)
        threshold = lors_kernels.residual_threshold(None, full, k=k)
        lors_kernels.merge_update(out, None, full, threshold=threshold)
        return out

    def svd(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(u [m, r], sigma, v [n, r]) of delta, in float64: QR of both factors, the SVD of the small matrix between them."""
        if self.known is not None:
            return self.known
        q_left, r_left = np.linalg.qr(self.left.astype(np.float64))
        q_right, r_right = np.linalg.qr(self.right.astype(np.float64))
        u, sigma, vh = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
        return q_left @ u, sigma, q_right @ vh.T
