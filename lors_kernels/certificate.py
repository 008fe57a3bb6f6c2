"""What block Krylov spaces prove about truncated SVDs: csrc/cpu/certificate.cpp, batched over pairs.

docs/certificate.md has the argument. A pair's space has a basis Q with G Q = Q T + Q' B, Q' being the next block; T has the
Ritz values `theta` and the eigenvectors s. An eigenvector of G with value lambda has of Ritz vector j

    (B s_j) . (its part in Q') / (lambda - theta_j)

and what it has of the start block follows from these parts. The start was drawn at random: that is not small, or else the
eigenvector was missed by bad luck, whose probability `unseen` bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ERROR_BOUND = 9.5e-6  # of L, relative; the contract is 1e-5, rounding of the factors included
ENERGY_BOUND = 5e-7  # of ||delta - L||^2, relative; the contract is 1e-6
EQUAL = 1.9e-6  # relative difference below which two theta count as equal: 1e-6 of singular values
UNSEEN = 1e-3  # probability with which an eigenvector may have been missed
COPY = 1e-4  # the same for one more copy of a value that was found; rounding allows no less
EXTRA = 12  # Ritz pairs beyond the wanted ones that are looked at
CAPTURED = 4e-6  # of delta's norm: what L may leave out for L = delta to hold
# Rounding of products with G and of the orthogonalisation: of what lies near an eigenvalue, relative to its geometric mean
# with theta_1 (three tf32 terms on tensor cores included); and of anything, relative to theta_1 (`orthonormalise` adds that).
# Last, that of the Ritz values themselves, which may mix what was rounded at the height of theta_1.
ROUNDING = {"torch.float32": (2e-7, 1e-9, 5e-8), "torch.float64": (2e-16, 2e-13, 2e-13)}
TINY = 1e-300
WORKSPACE = 1 << 28  # bytes that one question takes at a time


@dataclass
class Spectrum:
    """The Ritz pairs of A spaces of s dimensions each, largest first, float64."""

    theta: Tensor  # [A, s]
    vectors: Tensor  # [A, s, s], column j belongs to theta[:, j]
    ends: Tensor  # [A, w, s]: residuals in terms of the next block
    starts: int  # the first so many basis vectors were drawn at random
    n: int
    rounding: tuple[float, float, float]

    def __post_init__(self) -> None:
        self.rho = self.ends.norm(dim=1)
        self.residual = (self.rho.square() + self.noise(self.theta).square()).sqrt()  # as it may be measured
        self.first = self.vectors[:, : self.starts]
        self.share = self.first.norm(dim=1) * math.sqrt(self.n)

    def take(self, rows: Tensor) -> Spectrum:
        theta, vectors, ends = (x.index_select(0, rows) for x in (self.theta, self.vectors, self.ends))
        return Spectrum(theta, vectors, ends, self.starts, self.n, self.rounding)

    def noise(self, value: Tensor) -> Tensor:
        """What rounding does to a residual near `value` [A, L]."""
        first = self.theta[:, :1].clamp_min(0)
        return self.rounding[0] * (first * value.clamp_min(0)).sqrt() + self.rounding[1] * first

    def blur(self, value: Tensor) -> Tensor:
        """What it does to a Ritz value."""
        return self.noise(value) + self.rounding[2] * self.theta[:, :1].clamp_min(0)

    def above(self, value: Tensor) -> Tensor:
        """Where a Ritz value of this size may lie without rounding, at most."""
        return value + 2 * self.blur(value)

    def unseen(self, value: Tensor, found: Tensor) -> Tensor:
        """[A, L]: the probability that the start had too little of an eigenvector of this value [A, L], besides those of
        the first found [A, L] Ritz values, for the space to show it."""
        import torch

        # the found ones that reach furthest, as many as leave a direction of the start free
        most = min(self.starts - 1, self.theta.shape[1])
        ends = self.ends.shape[1]
        step = max(1, WORKSPACE // (24 * value.shape[1] * (most + 1) * self.starts * ends))
        if len(value) > step:
            parts = torch.arange(len(value), device=value.device).split(step)
            return torch.cat([self.take(rows).unseen(value[rows], found[rows]) for rows in parts])
        away = value.unsqueeze(2) - self.theta.unsqueeze(1)  # [A, L, s]
        distance, rho = away.abs(), self.rho.unsqueeze(1)
        push = torch.where(rho > 0, torch.sign(away) / torch.maximum(distance, rho).clamp_min(TINY), 0.0)
        floor = self.noise(value).unsqueeze(2)
        shake = torch.where(floor < distance, floor / distance.clamp_min(TINY), 1.0)
        share = self.share.unsqueeze(1)
        reach = share * torch.maximum(rho * push.abs(), shake)
        index = torch.arange(self.theta.shape[1], device=value.device)
        nearest = torch.where(index < found.unsqueeze(2), reach, -1.0).topk(most, dim=2)  # [A, L, most]
        aside = (nearest.values >= 0).double()
        rest = torch.ones_like(reach).scatter_(2, nearest.indices, 1 - aside)
        # part of the start = m @ (part of the next block) + shaken, of all but the nearest, and with one more of these after
        # the other: with the c nearest explained by what was found, starts - c directions remain
        pairs = (self.first.unsqueeze(1) * self.ends.unsqueeze(2)).flatten(1, 2).mT  # [A, s, w starts]
        near = pairs.gather(1, nearest.indices.flatten(1).unsqueeze(2).expand(-1, -1, pairs.shape[2]))
        near = near.unflatten(1, aside.shape[1:]) * (push.gather(2, nearest.indices) * aside).unsqueeze(3)
        m = torch.cat([((push * rest) @ pairs).unsqueeze(2), near.flip(2)], 2).cumsum(2)  # [A, L, most + 1, w starts]
        part = (share * shake).square()
        shaken = torch.cat([(part * rest).sum(2, keepdim=True), (part.gather(2, nearest.indices) * aside).flip(2)], 2)
        exact, free = self.n * m.square().sum(3), torch.arange(self.starts - most, self.starts + 1, device=value.device)
        chance = (exact + shaken.cumsum(2)).sqrt() ** free
        copy = UNSEEN / COPY * exact.sqrt() ** free
        chance[:, :, :most] = torch.maximum(chance[:, :, :most], copy[:, :, :most])
        return chance.amin(2).clamp_max(1)

    def cut(self, count: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """(ok, upper) [A, C]: whether the first count [A, C] Ritz values, at most `most`, are all that there is above
        `upper`."""
        import torch

        most = min(most, self.theta.shape[1] - 1)
        count = count.clamp_max(most)
        following = self.theta.gather(1, count).clamp_min(0).unsqueeze(2)
        last = self.theta.gather(1, (count - 1).clamp_min(0)).unsqueeze(2)
        uppers = following + (last - following) * following.new_tensor([1 / 16, 1 / 4, 1 / 2])  # [A, C, 3]
        above = self.above(uppers.flatten(1)).view_as(uppers)
        poles = self.theta[:, :most].unsqueeze(1).expand(-1, count.shape[1], -1)
        values = torch.cat([poles, uppers], 2)
        found = count.unsqueeze(2)
        seen = self.unseen(values.flatten(1), found.expand_as(values).flatten(1)).view_as(values) <= UNSEEN
        settled = (seen[:, :, :most] | (torch.arange(most, device=count.device) >= found)).all(2)
        free = (above < last) & seen[:, :, most:]
        return settled & free.any(2), above.gather(2, free.double().argmax(2, keepdim=True)).squeeze(2)

    def settled(self, needed: Tensor, most: int) -> Tensor:
        """[A]: whether each of the first `needed` values, at most `most`, has shown all its copies."""
        import torch

        values = self.theta[:, :most]
        found = torch.full_like(values, self.theta.shape[1])
        unwanted = torch.arange(values.shape[1], device=needed.device) >= needed.unsqueeze(1)
        return ((self.unseen(values, found) <= UNSEEN) | unwanted).all(1)


def error_bound(
    theta: Tensor, rho: Tensor, rank: int, count: Tensor, upper: Tensor, turn: Tensor | None = None
) -> Tensor:
    """[...]: bound on ||A V V.T - L|| / ||L||, V the first `rank` of the vectors with Rayleigh quotients theta [..., m] and
    residuals rho [..., m], of which V.T G V is diagonal up to turn [...], where no eigenvalue but count [...] of them lies
    above upper [...]."""
    import torch

    held = torch.arange(theta.shape[-1], device=theta.device) < count.unsqueeze(-1)
    beside = _beside(theta, rho, held, upper)
    value = theta[..., :rank].clamp_min(0)
    wide = value - beside.unsqueeze(-1)
    gap = value.unsqueeze(-1) - theta[..., rank:].unsqueeze(-2)  # [..., rank, m - rank]
    extra = held[..., rank:].unsqueeze(-2)
    apart = (wide > 0) & ~(extra & (gap <= 0)).any(-1)
    square, gap = torch.where(extra, rho[..., rank:].square().unsqueeze(-2), 0.0), gap.clamp_min(TINY)
    leak = (square / gap).sum(-1) / wide.clamp_min(TINY)
    spread = 1 + (square / gap.square().clamp_min(TINY)).sum(-1)
    sine = rho[..., :rank] / (wide * (1 - leak)).clamp_min(TINY)
    mixed = 0.0 if turn is None else (extra * (turn[..., None, None] / gap).square()).sum(-1)
    sine2 = torch.where(apart & (leak < 1), (sine.square() * spread + mixed).clamp_max(1), 1.0)
    wanted = held[..., :rank]
    tail = torch.where(wanted, rho[..., :rank].square(), 0.0).flip(-1).cumsum(-1).flip(-1).sqrt()
    largest = value + tail  # of the eigenvalue
    following = torch.where(count > rank, (theta + rho)[..., min(rank, theta.shape[-1] - 1)], upper).clamp_min(0)
    error = (largest + torch.minimum(largest, following.unsqueeze(-1))) * sine2
    error = torch.where(wanted, error, 2 * upper.unsqueeze(-1)).sum(-1)
    kept = value.sum(-1)
    return torch.where(kept > 0, (error / kept.clamp_min(TINY)).sqrt(), 0.0)


def energy_bound(theta: Tensor, rho: Tensor, count: Tensor, upper: Tensor) -> Tensor:
    """[A]: how much less energy than the optimum the first count [A] of these vectors capture, at most."""
    import torch

    held = torch.arange(theta.shape[1], device=theta.device) < count.unsqueeze(1)
    last = theta.gather(1, (count - 1).clamp_min(0).unsqueeze(1)).squeeze(1)
    gap = (last - _beside(theta, rho, held, upper)).unsqueeze(1)
    lost = torch.where(gap > 0, torch.minimum(rho, 2 * rho.square() / gap.clamp_min(TINY)), rho)
    return torch.where(held, lost, 0.0).sum(1)


def _beside(theta: Tensor, rho: Tensor, held: Tensor, upper: Tensor) -> Tensor:
    """`upper`, and what the captured part may lend to what lies beside it."""
    import torch

    lead = theta - upper.unsqueeze(-1)
    return upper + torch.where(held & (lead > 0), rho.square() / lead.clamp_min(TINY), 0.0).sum(-1)


def needed(theta: Tensor, rank: int) -> Tensor:
    """[A]: how many of the wanted pairs matter; what the others hold is not worth telling apart."""
    import torch

    wanted = theta[:, :rank].clamp_min(0)
    left = 2 * torch.arange(rank, 0, -1, device=theta.device) * wanted
    return (left > 0.1 * ERROR_BOUND**2 * wanted.sum(1, keepdim=True)).sum(1)
