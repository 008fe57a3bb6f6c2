"""Truncated SVDs of a group of matrices by block Krylov iteration, each with a certificate.

The mathematics and the acceptance rules are those of csrc/cpu/truncated_svd.cpp, batched over the group; certificate.py has
what the spaces prove. Block Lanczos on G = A.T A with full reorthogonalisation, A being delta or its transpose, whichever
has fewer columns (N). After j passes the basis Q [N, s] spans the block Krylov space, T = Q.T G Q is known from the
orthogonalisation coefficients, and its leading eigenpairs (theta, s) give v = Q s.

When a pair's own numbers promise the bound, its vectors are measured: one pass more, which forms A v. Where rounding mixes
the pairs at the cut, some beyond it are measured too, after a Rayleigh-Ritz step in float64. Where that does not do the
iteration is repeated in float64, and where more copies of a value may be there than the block is wide, or the space is too
small for Krylov to pay, a dense solver runs. Inside an iteration the host never waits for the device: it does behind the
first pass, for the magnitudes of delta, at each look at the spectra, and at each measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..certificate import (
    CAPTURED,
    ENERGY_BOUND,
    EQUAL,
    ERROR_BOUND,
    EXTRA,
    ROUNDING,
    UNSEEN,
    Spectrum,
    energy_bound,
    error_bound,
    needed,
)
from ..group import GroupSVD, MatrixGroup
from ..precision import full_precision
from ..types import DENORMAL, FACTORS, FactorOverflowError, NonFiniteError, dense_claim
from . import cuda_module
from .eigh import eigh

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    # x [A, N, b] of the given pairs -> (A.T A x, A x)
    Apply = Callable[[Tensor], tuple[Tensor, Tensor]]

AIM = 0.5 * ERROR_BOUND  # of forecasts
# Outside this range of magnitudes squares of float32 entries overflow or vanish: float64 from the start.
MAGNITUDES = (2.0**-40, 2.0**20)
PRODUCT = {"krylov": 5e-7, "krylov64": 1e-15}  # rounding of A v, relative
NOISE = {"torch.float32": 1e-10, "torch.float64": 1e-13}  # what a block is filled with, relative to the largest value
WORKSPACE = 1 << 30  # bytes of float64 deltas formed at a time, in the fallbacks


def decompose(ops: Any, group: MatrixGroup, rank: int, seed: int) -> GroupSVD:
    """The factors of every pair. `ops` is a grouped backend; arguments are checked."""
    with full_precision():
        return _Driver(ops, group, rank, seed).run()


def orthonormalise(
    w: Tensor, basis: Tensor | None, scale: Tensor, noise: Tensor, level: float
) -> tuple[Tensor, Tensor]:
    """Q' with orthonormal columns, orthogonal to `basis`, and `below` with w = Q' @ below, up to rounding.

    Shifted Cholesky QR, a projection, and two Cholesky QRs more, the small products in float64 (Fukaya and others 2020).
    A direction of w that vanishes against `scale` (delta has low rank, or a vector has converged) is filled from `noise`:
    w plus noise, `level` of the scale and far below its own rounding error, has full rank, so no pivot fails and nothing is
    decided on the host. (Noise as large as the rounding error is a backward error of its own: it cost a digit of the
    float32 certificate.)
    """
    import torch

    if cuda_module.takes_orthonormalise(w, basis):
        return cuda_module.orthonormalise(w, basis, scale, noise, level)
    floor = torch.where(scale > 0, scale * level, 1.0).view(-1, 1, 1)
    q, below = _cholesky_qr(w.double() + floor * noise / math.sqrt(w.shape[-2]), shift=1e-13 * w.shape[-1])
    if basis is not None:
        narrow = q.to(w.dtype)
        q = torch.baddbmm(narrow, basis, basis.mT @ narrow, alpha=-1).double()
    for _ in range(2):
        q, r = _cholesky_qr(q, shift=0.0)
        below = r @ below
    return q.to(w.dtype), below


def expand(w: Tensor, basis: Tensor, columns: int, t: Tensor, noise: Tensor, level: float) -> Tensor:
    """One step of block Lanczos, after w [A, n, b] = G times the newest b of the first `columns` columns of the basis
    [A, n, room + b]: writes their rows and columns of t [A, room, room] = Q.T G Q, and the next block behind them. Returns
    `below` of w without its projection on them."""
    import torch

    old, q = columns - w.shape[2], basis[:, :, :columns]
    column = torch.zeros_like(t[:, :columns, old:columns])
    for _ in range(2):
        coefficients = q.mT @ w
        w = torch.baddbmm(w, q, coefficients, alpha=-1)
        column += coefficients
    column[:, old:] = 0.5 * (column[:, old:] + column[:, old:].mT)
    t[:, :columns, old:columns] = column
    t[:, old:columns, :columns] = column.mT
    scale = t.diagonal(dim1=1, dim2=2)[:, :columns].amax(1)
    basis[:, :, columns : columns + w.shape[2]], below = orthonormalise(w, q, scale, noise, level)
    return below


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
        self.image: Tensor | None = None  # G times the newest block, where that is known already

    @property
    def full(self) -> bool:
        return self.size >= self.limit

    def noise(self) -> Tensor:
        """One block for all pairs: the result of a pair does not depend on its neighbours."""
        import torch

        return torch.randn((self.n, self.width), generator=self.random, dtype=torch.float64, device=self.energy.device)

    def begin(self) -> None:
        """The first block: random directions, orthonormalised."""
        import torch

        block = self.noise().expand(len(self.energy), -1, -1)
        scale = torch.ones_like(self.energy)
        block = block.to(self.basis.dtype)
        level = NOISE[str(block.dtype)]
        self.basis[:, :, : self.width] = orthonormalise(block, None, scale, self.noise(), level)[0]

    def newest(self) -> Tensor:
        return self.basis[:, :, self.size : self.size + self.width].contiguous()

    def expand(self, apply: Apply) -> None:
        """One pass: projects G times the newest block, and leaves the next block, orthonormal, behind the basis."""

        self.reserve()
        image = apply(self.newest())[0] if self.image is None else self.image
        self.image = None
        self.size = s = self.size + self.width
        fused = cuda_module.takes_orthonormalise(image, self.basis)
        step = cuda_module.expand if fused else expand
        self.below = step(image, self.basis, s, self.t, self.noise(), NOISE[str(image.dtype)])

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

    def spectrum(self) -> Spectrum:
        """The eigenpairs of the projections, and their residuals in exact arithmetic."""

        theta, vectors = eigh(self.t[:, : self.size, : self.size])
        theta, vectors = theta.flip(1), vectors.flip(2)
        ends = self.below @ vectors[:, -self.width :]
        return Spectrum(theta, vectors, ends, self.width, self.n, ROUNDING[str(self.basis.dtype)])

    def keep(self, chosen: Tensor) -> None:
        """Goes on with some of the pairs."""
        self.basis, self.t, self.below, self.energy = (
            x.index_select(0, chosen) for x in (self.basis, self.t, self.below, self.energy)
        )
        if self.image is not None:
            self.image = self.image.index_select(0, chosen)


def krylov_limit(n: int, rank: int) -> int:
    """The largest basis worth growing."""
    return max(n // 2, 6 * rank + 128)


def krylov_pays(n: int, rank: int, width: int) -> bool:
    """Whether the basis, with a block to spare, stays inside the space; otherwise diagonalising it all is cheaper."""
    return krylov_limit(n, rank) + width <= n


def first_check(rank: int, width: int) -> int:
    return max(2, (rank + 2 * width - 1) // width + 2)


def passes_to_go(exact: list[float], previous: list[float] | None, since: int) -> int:
    """Passes until the median pair should meet its bound, from how fast its forecast has been falling."""
    waits = []
    for i, now in enumerate(exact):
        before = previous[i] if previous else 0.0
        rate = math.log(before / now) / since if before > 0 and 0 < now < before else 0.7
        wanted = math.log(max(1.0, now / (0.3 * ERROR_BOUND))) / max(rate, 0.3)
        waits.append(min(6, max(1, math.ceil(wanted * 0.85))))
    return sorted(waits)[len(waits) // 2]


class _Outlook:
    """What the spectra of the active pairs promise, on the host."""

    def __init__(self, s: Spectrum, rank: int, energy: Tensor) -> None:
        import torch

        self.spectrum, self.rank = s, rank
        self.reach = min(s.theta.shape[1], rank + EXTRA)
        self.needed = needed(s.theta, rank)
        beyond = torch.arange(rank + 1, self.reach, device=self.needed.device)
        # those that matter, alone, and with one more of those beyond the cut after the other: [A, C]
        self.counts = torch.cat([self.needed.unsqueeze(1), beyond.expand(len(self.needed), -1)], 1)
        bound, exact = self.forecast(self.counts)
        last, following = s.theta[:, rank - 1], s.theta[:, rank]
        level = (last - following <= EQUAL * last + 4 * s.noise(last.unsqueeze(1)).squeeze(1)) & (self.needed == rank)
        level &= s.rho[:, rank - 1 : rank + 1].amax(1) <= 1e-5 * last
        captured = energy - s.theta[:, :rank].sum(1) <= 2e-6 * energy
        columns = torch.stack([bound[:, 0], exact[:, 0], bound[:, 1:].amin(1), (level | captured).double()])
        self.bound, self.exact, self.apart, special = columns.tolist()
        self.special = [bool(x) for x in special]

    def forecast(self, count: Tensor) -> Tensor:
        """[2, A, C]: the bound if nothing unseen stands in the way: as it may be measured, and without rounding."""
        import torch

        s, m = self.spectrum, self.reach
        upper = (s.theta + s.rho).gather(1, count).clamp_min(0)
        rho = torch.stack([s.residual, s.rho])[:, :, :m]
        return error_bound(s.theta[:, None, :m], rho.unsqueeze(2), self.rank, count, upper).clamp_max(1)

    def rounded(self, i: int) -> bool:
        """Whether rounding, not the number of passes, limits the wanted pairs alone."""
        return self.exact[i] <= 0.5 * self.bound[i]

    def alone(self, i: int) -> bool:
        return self.bound[i] <= AIM or (self.rounded(i) and self.bound[i] <= 0.9 * ERROR_BOUND)

    def hopeless(self, i: int) -> bool:
        """Whether rounding alone exceeds the bound, of the wanted pairs and of those held apart."""
        return self.rounded(i) and min(self.bound[i], self.apart[i]) > 0.9 * ERROR_BOUND

    def aside(self, i: int) -> bool:
        """Whether a Rayleigh-Ritz step in float64 should end it, and sooner than more passes."""
        return self.special[i] or (self.apart[i] <= AIM and (self.rounded(i) or self.exact[i] > 30 * ERROR_BOUND))


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
        self.unique, self.scale = [True] * count, dict[int, float]()

    def run(self) -> GroupSVD:
        import torch

        krylov = None
        if krylov_pays(self.n, self.rank, self.ops.width):
            nothing = self.left.new_zeros(self.group.pairs, dtype=torch.float64)
            krylov = Krylov(len(nothing), self.n, self.rank, self.ops.width, nothing, torch.float32, self.seed)
            krylov.begin()
            krylov.image, *account = self.ops.first_pass(self.group, krylov.newest(), side=self.side)
        else:
            account = self.ops.measure(self.group)
        tops = self.measured(*account)
        everyone = list(range(self.group.pairs))
        plain = [p for p in everyone if MAGNITUDES[0] <= tops[p] <= MAGNITUDES[1] or tops[p] == 0]
        again = [p for p in everyone if p not in set(plain)]
        unsettled = plain
        if plain and krylov is not None:
            krylov.energy = self.energy
            if again:
                krylov.keep(_index(plain, self.energy.device))
            rounded, unsettled = self.single(krylov, plain)
            again += rounded
        self.double(sorted(again), tops, iterate=True)
        self.double(unsettled, tops, iterate=False)
        overflows, energy = torch.stack([(~torch.isfinite(self.left)).sum((1, 2)).double(), self.energy]).tolist()
        if any(overflows):
            raise FactorOverflowError(int(sum(overflows)), next(p for p, count in enumerate(overflows) if count))
        return GroupSVD(
            self.left,
            self.right,
            self.sigma,
            self.passes,
            self.residual,
            self.method,
            energy,
            self.ops.name,
            self.unique,
        )

    def measured(self, energy: Tensor, bad: Tensor, top: Tensor) -> list[float]:
        """Keeps the energies and returns the largest magnitudes; raises for what is not finite."""
        import torch

        self.energy = energy
        bads, tops = torch.stack([bad.double(), top.double()]).tolist()
        if any(bads):  # a first pass does not say how many, and its sums may have overflowed
            self.energy, bad, top = self.ops.measure(self.group)
            bads, tops = torch.stack([bad.double(), top.double()]).tolist()
            if any(bads):
                raise NonFiniteError(int(sum(bads)))
        return tops  # type: ignore[no-any-return]

    def single(self, krylov: Krylov, pairs: list[int]) -> tuple[list[int], list[int]]:
        """Float32 iteration; returns the pairs that rounding kept from the bound, and those that more passes would not
        settle."""

        def apply_to(chosen: list[int]) -> Apply:
            part = self.group if chosen == list(range(self.group.pairs)) else self.group.take(chosen)
            return lambda x, product=False: self.ops.gram_apply(part, x, side=self.side, product=product)  # type: ignore[misc]

        return self.iterate(krylov, pairs, apply_to, self.deltas, "krylov")

    def deltas(self, pairs: list[int]) -> Tensor:
        """Their deltas, transposed when wide: formed in float32 as everywhere, then float64."""
        import torch

        some = [self.group.pair(p) for p in pairs]
        delta = torch.stack([tuned for _, tuned in some]).float()
        if self.group.bases is not None:
            delta -= torch.stack([base for base, _ in some if base is not None]).float()
        return (delta.mT if self.wide else delta).double()

    def double(self, pairs: list[int], tops: list[float], *, iterate: bool) -> None:
        """Float64: the iteration, then dense; a few pairs at a time, their delta in memory."""
        import torch

        width = 8
        for part in self.parts(pairs):
            # in the range where squares are harmless; powers of two, so that nothing is rounded
            scale = torch.tensor(
                [2.0 ** -math.frexp(tops[p])[1] if tops[p] else 1.0 for p in part], dtype=torch.float64
            )
            a = self.deltas(part) * scale.to(self.energy.device).view(-1, 1, 1)
            self.scale.update(zip(part, scale.tolist(), strict=True))
            energy = a.square().sum((1, 2))
            self.energy[part] = energy / scale.to(energy.device).square()
            hard = part
            if iterate and krylov_pays(self.n, self.rank, width):
                krylov = Krylov(len(part), self.n, self.rank, width, energy, torch.float64, self.seed)
                krylov.begin()
                where = {p: i for i, p in enumerate(part)}

                def rows_of(chosen: list[int], a: Tensor = a, where: dict[int, int] = where) -> Tensor:
                    return a if len(chosen) == len(a) else a[[where[p] for p in chosen]]

                def apply_to(chosen: list[int], rows_of: Any = rows_of) -> Apply:
                    rows = rows_of(chosen)
                    return lambda x, product=False: (rows.mT @ (y := rows @ x), y)  # type: ignore[misc]

                hard = sorted(sum(self.iterate(krylov, part, apply_to, rows_of, "krylov64"), []))
            for p in hard:
                self.dense(p, a[part.index(p)])

    def parts(self, pairs: list[int]) -> Iterator[list[int]]:
        """As many at a time as the workspace holds in float64."""
        step = max(1, WORKSPACE // (8 * self.group.m * self.group.n))
        return (pairs[first : first + step] for first in range(0, len(pairs), step))

    def iterate(
        self,
        krylov: Krylov,
        pairs: list[int],
        apply_to: Callable[[list[int]], Any],
        deltas: Callable[[list[int]], Tensor],
        method: str,
    ) -> tuple[list[int], list[int]]:
        """Grows the spaces until every pair is certified or cannot be; returns those that rounding kept from it, and those
        that more passes would not settle."""
        rounded, unsettled = list[int](), list[int]()
        active, previous, tried, waited = list(pairs), None, dict.fromkeys(pairs, 0), dict.fromkeys(pairs, 0)
        apply = apply_to(active)
        wait, since = first_check(self.rank, krylov.width), 0
        while active:
            krylov.expand(apply)
            wait, since = wait - 1, since + 1
            if wait > 0 and not krylov.full:
                continue
            outlook = _Outlook(krylov.spectrum(), self.rank, krylov.energy)
            done = set[int]()
            ready = [i for i in range(len(active)) if krylov.full or outlook.alone(i)]
            mixed = self.finish_alone(krylov, outlook, ready, active, apply_to, method, done) if ready else set[int]()
            aside = [i for i in range(len(active)) if krylov.full or i in mixed or outlook.aside(i)]
            aside = [i for i in aside if i not in done and (tried[active[i]] < 2 or krylov.full)]
            if aside:
                self.finish_apart(krylov, outlook, aside, active, deltas, method, done)
            for i in range(len(active)):
                if i not in done and outlook.hopeless(i):
                    rounded.append(active[i])
                    done.add(i)
            left = [i for i in sorted({*ready, *aside}) if i not in done]
            if left:
                where = _index(left, krylov.energy.device)
                settled = outlook.spectrum.take(where).settled(outlook.needed[where], self.rank).tolist()
                for i, fine in zip(left, settled, strict=True):
                    p = active[i]
                    tried[p] += i in aside and fine
                    waited[p] += not fine
                    if krylov.full or tried[p] > 1 or waited[p] > 2:
                        (rounded if fine and not krylov.full else unsettled).append(p)
                        done.add(i)
            for p in {*rounded, *unsettled} & {active[i] for i in done}:
                self.passes[p] += krylov.size // krylov.width
            rest = [i for i in range(len(active)) if i not in done]
            if done and rest:
                krylov.keep(_index(rest, krylov.energy.device))
                active = [active[i] for i in rest]
                apply = apply_to(active)
            elif done:
                break
            exact = [min(outlook.exact[i], outlook.apart[i]) if outlook.rounded(i) else outlook.exact[i] for i in rest]
            wait = passes_to_go(exact, [previous[i] for i in rest] if previous else None, since)
            previous, since = exact, 0
        return sorted(rounded), sorted(unsettled)

    def finish_alone(
        self,
        krylov: Krylov,
        outlook: _Outlook,
        ready: list[int],
        active: list[int],
        apply_to: Callable[[list[int]], Any],
        method: str,
        done: set[int],
    ) -> set[int]:
        """The wanted pairs as the spaces have them, by one product; adds to `done` whom that certifies and returns those
        whom more passes would not help, since rounding has enlarged their residuals."""
        import torch

        s = outlook.spectrum.take(_index(ready, krylov.energy.device))
        count = outlook.needed[ready]
        shown, upper = (x.squeeze(1) for x in s.cut(count.unsqueeze(1), self.rank))
        rho = torch.stack([s.residual, s.rho])[:, :, : self.rank]
        expected, exact = error_bound(s.theta[:, : self.rank], rho, self.rank, count, upper)
        chosen = [i for i, fine in enumerate((shown & (expected <= ERROR_BOUND)).tolist()) if fine]
        if not chosen:
            return set()
        where, rows = _index(chosen, krylov.energy.device), [ready[i] for i in chosen]
        s, count, upper, exact = s.take(where), count[where], upper[where], exact[where]
        basis = self._pick(krylov.basis[:, :, : krylov.size], rows)
        v = basis @ s.vectors[:, :, : self.rank].to(basis.dtype)
        z, y = apply_to([active[i] for i in rows])(v, product=True)
        v, z, y = v.double(), z.double(), y.double()
        theta = y.square().sum(1)
        rho = (z - theta.unsqueeze(1) * v).norm(dim=1)
        skew = (v.mT @ v - _eye(self.rank, v)).norm(dim=(1, 2))
        error = error_bound(theta, rho, self.rank, count, upper) + skew + PRODUCT[method]
        fine = error <= ERROR_BOUND
        self.accept(rows, active, fine, error, theta, v, y, krylov, method, done)
        return {rows[i] for i, useless in enumerate((~fine & (exact <= 0.5 * error)).tolist()) if useless}

    def finish_apart(
        self,
        krylov: Krylov,
        outlook: _Outlook,
        chosen: list[int],
        active: list[int],
        deltas: Callable[[list[int]], Tensor],
        method: str,
        done: set[int],
    ) -> None:
        """More pairs than wanted, after a Rayleigh-Ritz step in float64; adds to `done` whom that certifies."""
        import torch

        rank, m = self.rank, outlook.reach
        for rows in self.parts(chosen):
            where = _index(rows, krylov.energy.device)
            s, a = outlook.spectrum.take(where), deltas([active[i] for i in rows])
            v = self._pick(krylov.basis[:, :, : krylov.size], rows).double() @ s.vectors[:, :, :m]
            for _ in range(2):
                v = _cholesky_qr(v, shift=0.0)[0]
            y = a @ v
            theta, turned = torch.linalg.eigh(y.mT @ y)
            theta, turned = theta.flip(1), turned.flip(2)
            v, y = v @ turned, y @ turned
            rho = (a.mT @ y - theta.unsqueeze(1) * v).norm(dim=1)
            turn = ROUNDING["torch.float64"][0] * theta[:, 0]
            counts = outlook.counts[where]
            shown, upper = s.cut(counts, m - 1)
            error = error_bound(theta.unsqueeze(1), rho.unsqueeze(1), rank, counts, upper, turn.unsqueeze(1))
            error = torch.where(shown, error, math.inf).amin(1)
            # L leaves so little of delta that it is delta
            energy, kept = a.square().sum((1, 2)), theta[:, :rank].sum(1)
            rest, cancellation = (energy - kept).clamp_min(0), 1.2e-16 * (a.shape[1] + a.shape[2])
            left = (rest / energy.clamp_min(1e-300) + cancellation).sqrt()
            error = torch.where(left <= CAPTURED, torch.minimum(error, 2 * left), error)
            # values are equal across the cut: one choice is as good as another, if nothing above them is missing
            last, following = theta[:, rank - 1], theta[:, rank]
            slack = torch.minimum(0.5 * ENERGY_BOUND * rest / rank, EQUAL * last - (last - following)).clamp_min(0)
            upper = last + slack
            count, found = ((theta > x.unsqueeze(1)).sum(1) for x in (upper, last * (1 - EQUAL)))
            values = torch.maximum(s.theta[:, :rank], upper.unsqueeze(1))
            clear = s.unseen(values, found.unsqueeze(1).expand_as(values)).amax(1) <= UNSEEN
            if m < s.theta.shape[1]:  # rounding may have mixed those that are not held apart with those that are
                clear &= s.above(s.theta[:, m : m + 1]).squeeze(1) <= upper
            lost = energy_bound(theta, rho, count, upper) + slack * rank
            level = (last - following <= EQUAL * last) & clear & (lost <= ENERGY_BOUND * rest)
            level &= (left > CAPTURED) & (rest > 100 * cancellation * energy)
            lost = 1.02 * (lost + FACTORS**2 * kept)  # rounding of the factors, orthogonal to what is lost
            error = torch.where(level, lost / rest.clamp_min(1e-300), error)
            fine = level | (error <= ERROR_BOUND)
            wanted = theta[:, :rank], v[:, :, :rank], y[:, :, :rank]
            self.accept(rows, active, fine, error, *wanted, krylov, method, done, level=level)

    def accept(
        self,
        rows: list[int],
        active: list[int],
        fine: Tensor,
        error: Tensor,
        theta: Tensor,
        v: Tensor,
        y: Tensor,
        krylov: Krylov,
        method: str,
        done: set[int],
        *,
        level: Tensor | None = None,
    ) -> None:
        """Stores the factors of the pairs that are fine, and what is claimed of them."""
        import torch

        level = torch.zeros_like(fine) if level is None else level
        kept = theta.sum(1).clamp_min(0).sqrt()
        known = torch.stack([fine.double(), error, kept, level.double()], 1).tolist()  # one read
        chosen = [i for i, (good, *_) in enumerate(known) if good]
        if not chosen:
            return
        where, pairs = _index(chosen, fine.device), [active[rows[i]] for i in chosen]
        self.store(pairs, theta[where].clamp_min(0).sqrt(), v[where], y[where])
        for p, (_, bound, norm, equal) in zip(pairs, (known[i] for i in chosen), strict=True):
            self.passes[p] += krylov.size // krylov.width + 1
            self.method[p], self.unique[p] = method, not equal
            spacing = DENORMAL * math.sqrt(self.left[p].numel()) * self.scale.get(p, 1.0)
            self.residual[p] = bound if equal or not norm else bound + FACTORS + spacing / norm
        done.update(rows[i] for i in chosen)

    def store(self, pairs: list[int], sigma: Tensor, v: Tensor, y: Tensor) -> None:
        """Factors from right vectors v [A, N, r] of A and y = A v [A, M, r], sorted by what was measured."""
        import torch

        order = sigma.argsort(dim=1, descending=True, stable=True)
        sigma = sigma.gather(1, order)
        v, y = (x.gather(2, order.unsqueeze(1).expand_as(x)) for x in (v, y))
        scale = torch.tensor([self.scale.get(p, 1.0) for p in pairs], dtype=torch.float64, device=v.device).view(
            -1, 1, 1
        )
        if self.wide:
            inverse = torch.where(sigma > 0, 1 / sigma.clamp_min(1e-300), 0.0)
            left, right = v * sigma.unsqueeze(1) / scale, y * inverse.unsqueeze(1)
        else:
            left, right = y / scale, v
        sigma = sigma / scale[:, 0]
        for target, found in ((self.left, left), (self.right, right), (self.sigma, sigma)):
            if len(pairs) == len(target):
                target.copy_(found)
            else:
                target.index_copy_(0, _index(pairs, target.device), found.float())

    def dense(self, p: int, a: Tensor) -> None:
        """Eigenvectors of A.T A in float64, or where that squares too much away the SVD; a [M, N]."""
        import torch

        theta, vectors = torch.linalg.eigh(a.mT @ a)
        sigma = theta.flip(0).clamp_min(0).sqrt().tolist()
        residual, unique = dense_claim(sigma, self.rank, self.left[p].numel(), self.scale[p], squared=True)
        self.method[p] = "eigh64"
        vectors = vectors[:, -self.rank :].flip(1)
        if residual > ERROR_BOUND:
            _, s, vh = torch.linalg.svd(a, full_matrices=False)
            residual, unique = dense_claim(s.tolist(), self.rank, self.left[p].numel(), self.scale[p])
            self.method[p], vectors = "svd64", vh[: self.rank].T
        self.residual[p], self.unique[p] = residual, unique
        y = a @ vectors
        self.store([p], y.norm(dim=0).unsqueeze(0), vectors.unsqueeze(0), y.unsqueeze(0))

    def _pick(self, x: Tensor, pairs: list[int]) -> Tensor:
        return x if len(pairs) == len(x) else x.index_select(0, _index(pairs, x.device))


def _eye(n: int, like: Tensor) -> Tensor:
    import torch

    return torch.eye(n, dtype=like.dtype, device=like.device)


def _index(rows: list[int], device: torch.device) -> Tensor:
    import torch

    return torch.tensor(rows, dtype=torch.int64, device=device)
