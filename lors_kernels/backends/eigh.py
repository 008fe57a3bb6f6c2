"""Eigenpairs of a batch of small symmetric matrices in float64.

torch.linalg.eigh, but for matrices on a GPU where the CUDA module is there and takes their size: up to torch 2.11 it hands
a GPU's library one matrix of the batch after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import cuda_module

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-12  # of residual and orthogonality, which are near 1e-15


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """(theta [A, n] smallest first, vectors [A, n, n] in columns) of symmetric a [A, n, n] float64, both of whose triangles
    are read. Residual and orthogonality of our own are measured, and what misses `TOLERANCE`, which nothing finite should, is
    done again by torch. Waits for the device."""
    import torch

    if not cuda_module.takes_eigh(a):
        return torch.linalg.eigh(a)
    theta, vectors, error = cuda_module.eigh(a)
    missed = (~(error <= TOLERANCE)).nonzero().flatten()
    if len(missed):
        theta[missed], vectors[missed] = torch.linalg.eigh(a[missed])
    return theta, vectors
