"""The merge engine on GPUs.

From files or host memory: matrices that are decomposed, and tensors of which a method looks at all experts together, on
devices (`device_run.py`). Every other tensor is summed on the CPU beside them, because it is read, added to and written at the
speed of the files, which a detour over the bus cannot better; so are small tensors, of which a launch costs more than the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from .batches import Kind, Rule
from .cpu import Engine
from .device_run import DeviceRun
from .work import Piece, Work

SMALL = 1 << 16  # entries of a tensor below which the CPU is done before a device has begun


@dataclass
class GpuEngine(Engine):
    """`Engine` with what is worth it on `devices`.

    device_memory: bytes to use on each device; None: 80 % of what is free.
    device_backend: kernels there (`backend` is for the rest); None: the fastest.
    combines: whether the method's combinations work on tensors of a device.
    """

    devices: Sequence[str] = ("cuda:0",)
    device_memory: int | None = None
    device_backend: str | None = None
    combines: bool = False

    def run(self, works: Sequence[Work], also: Sequence[Callable[[], None]] = ()) -> None:
        """Does all work; matrices go to the devices, pieces of other tensors to threads as in `Engine`."""
        pieces = self.begin(works)
        there = [i for i, piece in enumerate(pieces) if self.worth_it(piece.work)]
        chosen = set(there)
        matrices = [DeviceRun(self, name, pieces, indices).run for name, indices in self.shares(pieces, there)]
        others = [partial(self.do, index) for index in range(len(pieces)) if index not in chosen]
        self.carry_out([*matrices, *also, *others], self.threads + len(self.devices))

    def worth_it(self, work: Work) -> bool:
        """Whether a tensor goes to a device."""
        if work.combination is not None:
            return self.combines and (work.matrix or work.spec.numel >= SMALL)
        return work.matrix and any(r.weight for r in work.reductions)

    def shares(self, pieces: Sequence[Piece], indices: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Splits the tensors by bytes: the largest first, each to the device with the least so far."""
        loads = dict.fromkeys(self.devices, 0)
        shares: dict[str, list[int]] = {name: [] for name in self.devices}
        for i in sorted(indices, key=lambda i: (-pieces[i].work.spec.numel, i)):
            name = min(self.devices, key=lambda name: loads[name])
            loads[name] += pieces[i].work.spec.numel
            shares[name].append(i)
        return [(name, sorted(share)) for name, share in shares.items() if share]

    def kind_of(self, work: Work) -> Kind:
        shape, dtypes = tuple(work.spec.shape), [str(e.tensors[work.name].dtype) for e in self.experts]
        if work.combination is not None:
            rules = tuple(Rule(0, 1.0, True, dtype, False) for dtype in dtypes)
            return Kind(shape, str(work.spec.dtype), rules, together=True)
        terms = self.terms(work)
        rules = tuple(
            Rule(r.rank, r.density, t in terms.experts, dtype, self.stored(t, work))
            for t, (dtype, r) in enumerate(zip(dtypes, work.reductions, strict=True))
        )
        return Kind(shape, str(terms.anchor.tensors[work.name].dtype), rules)

    def stored(self, t: int, work: Work) -> bool:
        """Whether expert t's delta is known by parts or factors."""
        expert = self.experts[t]
        return expert.parts is not None or (work.relative and expert.factors(work.name) is not None)

    def sizes_of(self, work: Work) -> tuple[int, int]:
        """Bytes per entry of the base, and at most of an expert."""
        return work.spec.dtype.itemsize, max(e.tensors[work.name].dtype.itemsize for e in self.experts)
