"""Truncated SVD of a group of matrices by block Krylov iteration, each with a measured certificate.

The mathematics and the acceptance rule are those of csrc/cpu/truncated_svd.cpp, batched over the group. Block Lanczos on
G = A.T A with full reorthogonalisation, A being delta or its transpose, whichever has fewer columns (N). After j passes
the basis Q [N, s] spans the block Krylov space, T = Q.T G Q is known from the orthogonalisation coefficients, and its
leading eigenpairs (theta, s) give v = Q s. One more pass forms A v and measures rho_i = ||G v_i - theta_i v_i||; then

    ||L - exact||^2 <~ sum_i (theta_i + theta_{r+1}) * min(1, rho_i / (theta_i - theta_{r+1}))^2          (Davis-Kahan)

Where float32 cannot meet the bound the iteration is repeated in float64 from the vectors found, and where that fails too,
or the space is too small for Krylov to pay, A.T A is formed in float64 and diagonalised. Inside an iteration the host
never waits for the device: it does at the measurement before, at each check, and at each certificate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .backends import cuda
from .eigh import eigh
from .grouped import GroupSVD, MatrixGroup
from .precision import full_precision
from .types import NonFiniteError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    # x [A, N, b] of the given pairs -> (A.T A x, A x)
    Apply = Callable[[Tensor], tuple[Tensor, Tensor]]

ERROR_BOUND = 8e-6  # of L, relative; the contract is 1e-5 and the bound errs upwards
ENERGY_BOUND = 5e-7  # of ||delta - L||^2, relative; the contract is 1e-6
EQUAL = 2e-6  # relative difference below which two theta count as equal
# Outside this range of magnitudes squares of float32 entries overflow or vanish: float64 from the start.
MAGNITUDES = (2.0**-40, 2.0**20)
WORKSPACE = 1 << 30  # bytes of float64 deltas formed at a time, in the fallbacks


def decompose(ops: Any, group: MatrixGroup, rank: int, seed: int) -> GroupSVD:
    """The factors of every pair. `ops` is a grouped backend; arguments are checked."""
    with full_precision():
        return _Driver(ops, group, rank, seed).run()


@dataclass
class _Ritz:
    theta: Tensor  # [A, s] float64, largest first
    vectors: Tensor  # [A, s, rank]
    error: Tensor  # [A] bound on the relative error of L
    accepted: Tensor  # [A] bool


def certify(theta: Tensor, rho: Tensor, rank: int, total_energy: Tensor) -> tuple[Tensor, Tensor]:
    """(bound on the relative error of L, accepted) from theta [A, s >= rank] and residual norms rho [A, rank]."""
    import torch

    wanted = theta[:, :rank].clamp_min(0)
    after = theta[:, rank : rank + 1].clamp_min(0) if theta.shape[1] > rank else torch.zeros_like(wanted[:, :1])
    gap = wanted - after
    turn = torch.where(rho >= gap, 1.0, rho / gap.clamp_min(1e-300))
    kept, lost = wanted.sum(1), (rho * turn).sum(1)
    error = torch.where(kept > 0, (((wanted + after) * turn * turn).sum(1) / kept.clamp_min(1e-300)).sqrt(), 0.0)
    rest = torch.maximum(total_energy - kept, 1e-12 * total_energy)
    energy = torch.where(lost > 0, lost / rest.clamp_min(1e-300), 0.0)
    last = wanted[:, -1]
    spread = torch.where(last > 0, (last - after[:, 0]) / last.clamp_min(1e-300), 0.0)
    return error, (error <= ERROR_BOUND) | ((spread <= EQUAL) & (energy <= ENERGY_BOUND))


def orthonormalise(w: Tensor, basis: Tensor | None, scale: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Q' with orthonormal columns, orthogonal to `basis`, and `below` with w = Q' @ below, up to rounding.

    Shifted Cholesky QR, a projection, and two Cholesky QRs more, the small products in float64 (Fukaya and others 2020).
    A direction of w that vanishes against `scale` (delta has low rank, or a vector has converged) is filled from `noise`:
    w plus noise far below its own rounding error has full rank, so no pivot fails and nothing is decided on the host.
    (Noise as large as the rounding error is a backward error of its own: it cost a digit of the float32 certificate.)
    """
    import torch

    level = 1e-10 if w.dtype == torch.float32 else 1e-13
    if cuda.takes_orthonormalise(w, basis):
        return cuda.orthonormalise(w, basis, scale, noise, level)
    floor = torch.where(scale > 0, scale * level, 1.0).view(-1, 1, 1)
    q, below = _cholesky_qr(w.double() + floor * noise / math.sqrt(w.shape[-2]), shift=1e-13 * w.shape[-1])
    if basis is not None:
        narrow = q.to(w.dtype)
        q = torch.baddbmm(narrow, basis, basis.mT @ narrow, alpha=-1).double()
    for _ in range(2):
        q, r = _cholesky_qr(q, shift=0.0)
        below = r @ below
    return q.to(w.dtype), below


def _cholesky_qr(w: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """w = q @ r with r upper triangular, from the Cholesky factor of w.T w with its columns scaled to norm 1."""
    import torch

    norms = w.square().sum(-2, keepdim=True).sqrt().clamp_min(1e-300)
    unit = w / norms
    eye = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
    factor = torch.linalg.cholesky_ex(unit.mT @ unit + shift * eye)[0].mT
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=True)
    return unit @ inverse, factor * norms


class Krylov:
    """A grown basis of every active pair, and the projection of G on it."""

    def __init__(self, count: int, n: int, rank: int, width: int, energy: Tensor, dtype: Any, seed: int) -> None:
        import torch

        self.n, self.rank, self.width, self.energy = n, rank, width, energy
        self.size = 0
        self.limit = krylov_limit(n, rank) // width * width
        self.random = torch.Generator(energy.device).manual_seed(seed)
        room = min(self.limit, (first_check(rank, width) + 4) * width)
        self.basis = energy.new_empty((count, n, room + width), dtype=dtype)
        self.t = energy.new_zeros((count, room, room))
        self.below = energy.new_zeros((count, width, width))

    @property
    def full(self) -> bool:
        return self.size >= self.limit

    def noise(self) -> Tensor:
        """One block for all pairs: the result of a pair does not depend on its neighbours."""
        import torch

        return torch.randn((self.n, self.width), generator=self.random, dtype=torch.float64, device=self.energy.device)

    def begin(self, start: Tensor | None = None) -> None:
        """The first block: `start` [A, N, <= width], then random directions, orthonormalised."""
        import torch

        block = self.noise().expand(len(self.energy), -1, -1).clone()
        if start is not None:
            block[:, :, : start.shape[2]] = start
        scale = torch.ones_like(self.energy)
        self.basis[:, :, : self.width] = orthonormalise(block.to(self.basis.dtype), None, scale, self.noise())[0]

    def expand(self, apply: Apply) -> None:
        """One pass: projects G times the newest block, and leaves the next block, orthonormal, behind the basis."""
        import torch

        w, old = self.width, self.size
        self.reserve()
        image = apply(self.basis[:, :, old : old + w].contiguous())[0]
        self.size = s = old + w
        q = self.basis[:, :, :s]
        column = torch.zeros_like(self.t[:, :s, old:s])
        for _ in range(2):
            coefficients = q.mT @ image
            image = torch.baddbmm(image, q, coefficients, alpha=-1)
            column += coefficients
        column[:, old:] = 0.5 * (column[:, old:] + column[:, old:].mT)
        self.t[:, :s, old:s] = column
        self.t[:, old:s, :s] = column.mT
        scale = self.t.diagonal(dim1=1, dim2=2).amax(1)
        self.basis[:, :, s : s + w], self.below = orthonormalise(image, q, scale, self.noise())

    def reserve(self) -> None:
        """Room for one more block; doubles, since how long a spectrum takes is not known before."""
        room = self.t.shape[1]
        if self.size + self.width <= room:
            return
        room = min(self.limit, 2 * room)
        basis = self.basis.new_empty((len(self.energy), self.n, room + self.width))
        basis[:, :, : self.basis.shape[2]] = self.basis
        t = self.t.new_zeros((len(self.energy), room, room))
        t[:, : self.t.shape[1], : self.t.shape[1]] = self.t
        self.basis, self.t = basis, t

    def solve(self) -> _Ritz:
        """Leading eigenpairs of the projection, and the certificate they would have in exact arithmetic."""

        theta, vectors = eigh(self.t[:, : self.size, : self.size])
        theta, vectors = theta.flip(1), vectors[:, :, -self.rank :].flip(2)
        rho = (self.below @ vectors[:, -self.width :]).norm(dim=1)
        return _Ritz(theta, vectors, *certify(theta, rho, self.rank, self.energy))

    def keep(self, chosen: Tensor) -> None:
        """Goes on with some of the pairs."""
        self.basis, self.t, self.below, self.energy = (
            x.index_select(0, chosen) for x in (self.basis, self.t, self.below, self.energy)
        )


def krylov_limit(n: int, rank: int) -> int:
    """The largest basis worth growing."""
    return max(n // 2, 6 * rank + 128)


def krylov_pays(n: int, rank: int, width: int) -> bool:
    """Whether the basis, with a block to spare, stays inside the space; otherwise diagonalising it all is cheaper."""
    return krylov_limit(n, rank) + width <= n


def first_check(rank: int, width: int) -> int:
    return max(2, (rank + 2 * width - 1) // width + 2)


def passes_to_go(error: list[float], previous: list[float] | None, since: int) -> int:
    """Passes until the median pair should meet its bound, from how fast its bound has been falling."""
    waits = []
    for i, now in enumerate(error):
        before = previous[i] if previous else 0.0
        rate = math.log(before / now) / since if before > 0 and 0 < now < before else 0.7
        wanted = math.log(max(1.0, now / (0.3 * ERROR_BOUND))) / max(rate, 0.3)
        waits.append(min(6, max(1, math.ceil(wanted * 0.85))))
    return sorted(waits)[len(waits) // 2]


class _Driver:
    """One call of `decompose`: the factors found so far, and who still needs work."""

    def __init__(self, ops: Any, group: MatrixGroup, rank: int, seed: int) -> None:
        self.ops, self.group, self.rank, self.seed = ops, group, rank, seed
        self.wide = group.m < group.n
        self.side = "left" if self.wide else "right"
        self.n = min(group.m, group.n)
        count, like = group.pairs, group.like.new_empty(0).float()
        self.left = like.new_empty((count, group.m, rank))
        self.right = like.new_empty((count, group.n, rank))
        self.sigma = like.new_empty((count, rank))
        self.passes, self.residual, self.method = [0] * count, [0.0] * count, ["krylov"] * count

    def run(self) -> GroupSVD:
        self.energy, bad, top = self.ops.measure(self.group)
        if any(bad.tolist()):
            raise NonFiniteError(int(bad.sum()))
        tops, everyone = top.tolist(), range(self.group.pairs)
        plain = [p for p in everyone if MAGNITUDES[0] <= tops[p] <= MAGNITUDES[1] or tops[p] == 0]
        pays = krylov_pays(self.n, self.rank, self.ops.width)
        hard = self.single(plain) if plain and pays else plain
        self.double(sorted({*hard, *everyone} - ({*plain} - {*hard})))
        return GroupSVD(
            self.left,
            self.right,
            self.sigma,
            self.passes,
            self.residual,
            self.method,
            self.energy.tolist(),
            self.ops.name,
        )

    def single(self, pairs: list[int]) -> list[int]:
        """Float32 iteration; returns the pairs whose certificate it could not reach."""
        import torch

        krylov = Krylov(
            len(pairs), self.n, self.rank, self.ops.width, self._pick(self.energy, pairs), torch.float32, self.seed
        )
        krylov.begin()

        def apply_to(chosen: list[int]) -> Apply:
            part = self.group if chosen == list(range(self.group.pairs)) else self.group.take(chosen)
            return lambda x, product=False: self.ops.gram_apply(part, x, side=self.side, product=product)  # type: ignore[misc]

        return self.iterate(krylov, pairs, apply_to, "krylov")

    def double(self, pairs: list[int]) -> None:
        """Float64: the iteration from the vectors found, then dense; a few pairs at a time, their delta in memory."""
        import torch

        step = max(1, WORKSPACE // (8 * self.group.m * self.group.n))
        width = (self.rank // 8 + 1) * 8
        for first in range(0, len(pairs), step):
            part = pairs[first : first + step]
            a = torch.stack([_delta64(*self.group.pair(p), wide=self.wide) for p in part])
            self.energy[part] = a.square().sum((1, 2))
            hard = part
            if krylov_pays(self.n, self.rank, width):
                krylov = Krylov(
                    len(part), self.n, self.rank, width, self._pick(self.energy, part), torch.float64, self.seed
                )
                krylov.begin(self._start(part))
                where = {p: i for i, p in enumerate(part)}

                def apply_to(chosen: list[int], a: Tensor = a, where: dict[int, int] = where) -> Apply:
                    rows = a if len(chosen) == len(a) else a[[where[p] for p in chosen]]
                    return lambda x, product=False: (rows.mT @ (y := rows @ x), y)  # type: ignore[misc]

                hard = self.iterate(krylov, part, apply_to, "krylov64")
            if hard:
                self.dense(hard, a[[part.index(p) for p in hard]])

    def iterate(self, krylov: Krylov, pairs: list[int], apply_to: Callable[[list[int]], Any], method: str) -> list[int]:
        """Grows the bases until every certificate holds or cannot; returns the pairs for which it cannot."""
        active, failed, previous = list(pairs), [], None
        apply = apply_to(active)
        wait, since = first_check(self.rank, krylov.width), 0
        while active:
            krylov.expand(apply)
            wait, since = wait - 1, since + 1
            if wait > 0 and not krylov.full:
                continue
            ritz = krylov.solve()
            expected, promising = ritz.error.tolist(), ritz.accepted.tolist()
            ready = [i for i in range(len(active)) if promising[i] or krylov.full]
            done = set()
            if ready:
                found = self.finish(krylov, ritz, ready, active, apply_to([active[i] for i in ready]), method)
                for i, (error, accepted) in zip(ready, found, strict=True):
                    hopeless = krylov.full or error > 4 * max(expected[i], ERROR_BOUND / 4)
                    if accepted or hopeless:
                        done.add(i)
                        if not accepted:
                            failed.append(active[i])
            rest = [i for i in range(len(active)) if i not in done]
            if done and rest:
                krylov.keep(_index(rest, krylov.energy.device))
                active = [active[i] for i in rest]
                apply = apply_to(active)
            elif done:
                break
            errors = [expected[i] for i in rest]
            wait = passes_to_go(errors, [previous[i] for i in rest] if previous else None, since)
            previous, since = errors, 0
        return sorted(failed)

    def finish(
        self, krylov: Krylov, ritz: _Ritz, ready: list[int], active: list[int], apply: Any, method: str
    ) -> list[tuple[float, bool]]:
        """v from the basis, A v, the measured certificate; stores the factors. Returns (bound, accepted) of each."""
        where = _index(ready, krylov.energy.device)
        whole = len(ready) == len(active)
        basis, vectors, theta = (
            x if whole else x.index_select(0, where)
            for x in (krylov.basis[:, :, : krylov.size], ritz.vectors, ritz.theta)
        )
        v = basis @ vectors.to(basis.dtype)
        z, y = apply(v, product=True)
        v, z, y = v.double(), z.double(), y.double()
        measured = y.square().sum(1)  # [A, rank] = theta of v
        rho = (z - measured.unsqueeze(1) * v).norm(dim=1)
        energy = krylov.energy if whole else krylov.energy.index_select(0, where)
        error, accepted = certify(theta, rho, self.rank, energy)
        pairs = [active[i] for i in ready]
        self.store(pairs, measured.sqrt(), v, y)
        found = list(zip(error.tolist(), accepted.tolist(), strict=True))
        for p, (bound, _) in zip(pairs, found, strict=True):
            before = self.passes[p] if method == "krylov64" else 0
            self.passes[p] = before + krylov.size // krylov.width + 1
            self.residual[p], self.method[p] = bound, method
        return found

    def store(self, pairs: list[int], sigma: Tensor, v: Tensor, y: Tensor) -> None:
        """Factors from right vectors v [A, N, r] of A and y = A v [A, M, r], sorted by what was measured."""
        import torch

        order = sigma.argsort(dim=1, descending=True, stable=True)
        sigma = sigma.gather(1, order)
        v, y = (x.gather(2, order.unsqueeze(1).expand_as(x)) for x in (v, y))
        if self.wide:
            inverse = torch.where(sigma > 0, 1 / sigma.clamp_min(1e-300), 0.0)
            left, right = v * sigma.unsqueeze(1), y * inverse.unsqueeze(1)
        else:
            left, right = y, v
        for target, found in ((self.left, left), (self.right, right), (self.sigma, sigma)):
            if len(pairs) == len(target):
                target.copy_(found)
            else:
                target.index_copy_(0, _index(pairs, target.device), found.float())

    def dense(self, pairs: list[int], a: Tensor) -> None:
        """Eigenvectors of A.T A in float64; a [A, M, N]."""
        import torch

        vectors = torch.linalg.eigh(a.mT @ a)[1][:, :, -self.rank :].flip(2)
        y = a @ vectors
        self.store(pairs, y.norm(dim=1), vectors, y)
        for p in pairs:
            self.method[p], self.residual[p] = "eigh64", 1e-7

    def _start(self, pairs: list[int]) -> Tensor | None:
        """The right vectors float32 left behind, None if it did not run."""
        if not all(self.passes[p] for p in pairs):
            return None
        return self._pick(self.left if self.wide else self.right, pairs).double()

    def _pick(self, x: Tensor, pairs: list[int]) -> Tensor:
        return x if len(pairs) == len(x) else x.index_select(0, _index(pairs, x.device))


def _index(rows: list[int], device: torch.device) -> Tensor:
    import torch

    return torch.tensor(rows, dtype=torch.int64, device=device)


def _delta64(base: Tensor | None, tuned: Tensor, *, wide: bool) -> Tensor:
    """delta (its transpose when wide): formed in float32 as everywhere, then float64."""
    delta = (tuned.float() if base is None else tuned.float() - base.float()).double()
    return delta.T if wide else delta
