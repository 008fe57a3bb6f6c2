"""Dense decompositions of float64 matrices, on whatever device they are: singular triplets and polar factors.

By eigenvectors of the smaller Gram matrix where these are well defined by it, which takes a fraction of the time of an SVD;
else by SVD. Methods that make weak directions as large as strong ones need each of them right, which `truncated_svd` does
not promise: it promises L as a whole. Whoever can do with less than float64 says so by a tolerance: large matrices on a CPU
are then decomposed in float32, if what is measured afterwards keeps to it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .precision import full_precision

if TYPE_CHECKING:
    from torch import Tensor

# Of the largest eigenvalue: the least gap at a cut across which a Gram matrix in float64 tells directions apart, to 1e-8.
GRAM_GAP = 1e-7
# The eigenvectors of X^T X are good to 2^-53 over the share of its least eigenvalue: from here on to 1e-7.
GRAM_LIMIT = 1e-9
# Singular values that float32 entries have from their rounding alone: half a unit of each is 2^-23 of the largest at most.
ROUNDED = 2.0**-20
LARGE = 256  # columns from which on float32 saves time
BLOCK = 192  # columns of a Cholesky factor that are computed together
WEAK = 64  # directions of a polar factor that float32 leaves to float64


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(u [m, k], sigma [k] largest first, v [n, k]) of x [m, n] float64, k = min(m, n): x = u diag(sigma) v^T."""
    import torch

    if x.shape[0] < x.shape[1]:  # LAPACK is faster on tall matrices
        v, sigma, u = svd(x.T)
        return u, sigma, v
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    return u, sigma, vh.T


def leading(x: Tensor, rank: int, tolerance: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """(u [m, r], sigma [r] largest first, v [n, r]): the `rank` largest singular triplets of x [m, n] float64, without
    those of value 0 (`nonzero`).

    tolerance: root mean square of the angles by which the directions may be turned out of the space of the true ones;
        0 stands for what float64 gives: the rounding of a Gram matrix, 2^-53 of the largest eigenvalue, over the gap at the cut.
    """
    import torch

    if x.shape[0] < x.shape[1]:
        v, sigma, u = leading(x.T, rank, tolerance)
        return u, sigma, v
    if rank and tolerance and _may_be_single(x):
        from .backends import cpu, large_rank

        scale = _scale(x)
        found = large_rank.decompose(x * scale, rank, cpu.eigh_single)
        if found is not None:
            # the squared error of L is the sum of squared angles, each times two of the theta at least the last
            angles = found.residual * math.sqrt(float(found.theta.sum() / found.theta[-1]) / rank)
            if angles <= tolerance:
                sigma = found.theta.sqrt()
                return found.product / sigma, sigma / scale, found.vectors
    if rank:
        values, vectors = torch.linalg.eigh(x.T @ x)
        beyond = values[-rank - 1] if rank < len(values) else 0.0
        if values[-rank] - beyond > GRAM_GAP * values[-1]:
            v = vectors[:, -rank:].flip(1)
            product = x @ v
            sigma = torch.linalg.vector_norm(product, dim=0)
            return product / sigma, sigma, v
    u, sigma, v = svd(x)
    there = int(nonzero(sigma, x.shape)[:rank].sum())  # the first ones, since they are sorted
    return u[:, :there], sigma[:there], v[:, :there]


def polar(x: Tensor) -> Tensor:
    """X (X^T X)^(-1/2) [m, n] of X [m, n] float64, the nearest matrix with orthonormal columns (rows, where it is wide);
    directions of singular value 0 (`nonzero`) are left out."""
    return polar_and_values(x)[0]


def polar_and_values(x: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
    """The polar factor, and the singular values that are not 0. tolerance: root mean square of the angles by which its columns
    may be turned; 0 stands for what float64 gives."""
    import torch

    if x.shape[0] < x.shape[1]:
        factor, sigma = polar_and_values(x.T, tolerance)
        return factor.T, sigma
    if not x.numel():
        return x, x.new_empty(0)
    if tolerance and _may_be_single(x):
        factor, sigma, angles = _polar_single(x * _scale(x))
        if angles <= tolerance:
            return factor, sigma / _scale(x)
    values, vectors = torch.linalg.eigh(x.T @ x)
    if values[0] > GRAM_LIMIT * values[-1]:
        half = vectors * values**-0.25
        return x @ (half @ half.T), values.sqrt()
    u, sigma, v = svd(x)
    there = nonzero(sigma, x.shape)
    return u[:, there] @ v[:, there].T, sigma[there]


def _polar_single(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """(factor, singular values, angles) in float32: X V has orthogonal columns if V diagonalises X^T X, and with these columns
    made unit ones, Y, the factor is Y V^T. The weakest directions, in which float32 sees nothing but its rounding, are
    mended in float64. What Y lacks of orthonormality bounds the angles."""
    import torch

    from .backends import cpu, large_rank

    with full_precision():
        single = x.float()
        vectors = cpu.eigh_single(single.T @ single, x.shape[1])[1]
        strong, weak = vectors[:, :-WEAK], vectors[:, -WEAK:].double()
        images, product = single @ strong, x @ weak
        turn, theta = large_rank.held_apart(weak, product)
        weak, product = weak @ turn, product @ turn
        # one step of perturbation: what the weak directions are still turned by towards the strong ones
        residual = (x.T @ product - weak * theta).float()
        mixed = (strong.T @ residual) / (theta.float() - images.square().sum(0)[:, None])
        images = images - product.float() @ mixed.T
        strong, weak = strong - weak.float() @ mixed.T, weak + (strong @ mixed).double()
        product = x @ weak
        turn, _ = large_rank.held_apart(weak, product)
        weak, product = weak @ turn, product @ turn
        columns = torch.cat([images, product.float()], dim=1)
        sigma = torch.linalg.vector_norm(columns, dim=0)
        columns /= sigma
        factor = columns @ torch.cat([strong, weak.float()], dim=1).T
        skew = columns.T @ columns
        skew.diagonal().sub_(1)
        angles = float(torch.linalg.matrix_norm(skew)) / math.sqrt(len(sigma))
    return factor.double(), sigma.double(), angles if math.isfinite(angles) else math.inf


def _may_be_single(x: Tensor) -> bool:
    from .backends import cpu

    return x.device.type == "cpu" and x.shape[1] >= LARGE and cpu.probe()[0]


def _scale(x: Tensor) -> float:
    """The power of two that brings the entries of x between -1 and 1, so that their squares are harmless in float32."""
    return float(2.0 ** -math.frexp(float(x.abs().max()))[1])


def ridge_quotient(product: Tensor, gram: Tensor, goal: Tensor, ridge: float) -> Tensor:
    """(B + eps P) (S + eps I)^-1, eps = ridge * tr(S) / n, of B = product and P = goal [m, n] and S = gram [n, n], all of one
    type, in that type.

    S: symmetric without negative eigenvalues but for rounding, of which the lower triangle is read. It is what a least-squares
    problem with a ridge towards P comes down to. What S and B are off by, of tr(S) and of ||B||, may become n / ridge times as much. A
    matrix that the ridge does not make positive definite raises torch.linalg.LinAlgError. By Cholesky.
    """
    import torch

    total = gram.clone()
    epsilon = ridge * float(total.diagonal().double().sum()) / len(total)
    total.diagonal().add_(epsilon)
    right = product.add(goal, alpha=epsilon)
    factor = _cholesky(total) if total.device.type == "cpu" else torch.linalg.cholesky(total, out=total)
    return torch.cholesky_solve(right.T, factor).T


def _cholesky(a: Tensor) -> Tensor:
    """The Cholesky factor of a [n, n] in the place of its lower triangle, of which alone it is read; above stays what was there.

    torch's own sets that to zero, against the order in memory, which takes a large part of its time.
    """
    import torch

    for start in range(0, len(a), BLOCK):
        stop = start + BLOCK
        block, below = a[start:stop, start:stop], a[stop:, start:stop]
        block.copy_(torch.linalg.cholesky(block))
        if len(below):
            below.copy_(torch.linalg.solve_triangular(block.T, below, upper=True, left=False))
        for first in range(0, len(below), BLOCK):
            strip = a[stop + first :, stop + first : stop + first + BLOCK]
            strip.addmm_(below[first:], below[first : first + BLOCK].T, alpha=-1)
    return a


def boosted(sigma: Tensor, share: float) -> Tensor:
    """Singular values, largest first, with none below the first that brings their running sum to `share` of the whole."""
    if not len(sigma):
        return sigma
    reached = sigma.cumsum(0) >= share * sigma.sum()
    first = int(reached.nonzero()[0]) if reached.any() else len(sigma) - 1  # rounding may leave a share of 1 unreached
    return sigma.clamp(min=float(sigma[first]))


def boost(x: Tensor, share: float) -> Tensor:
    """U diag(boosted(S)) V^T of x = U S V^T [m, n] float64, whose values were rounded to float32: directions of less than
    ROUNDED of the largest singular value are what that left, and stay as they are."""
    u, sigma, v = leading(x, min(x.shape))
    there = int((sigma > sigma[:1] * ROUNDED).sum())
    sigma[:there] = boosted(sigma[:there], share)
    return (u * sigma) @ v.T


def nonzero(sigma: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Which singular values, largest first, of a float64 matrix of this shape are more than the rounding error of computing
    them."""
    return sigma > sigma[:1] * max(shape) * 2.0**-53
