"""What inputs have in common that they hardly should: notices that a merge prints, from digests and a few matrices.

Experts with the same files are found by their digests, an expert that equals the base by its values. A base that was
swapped with an expert is found by distances: experts lie around what they were trained from. With delta_i = W_i - W_0 over
the sampled entries, expert e is suspected of being the base when for every other expert j

    ||delta_j - delta_e||^2 < NEARER ||delta_j||^2        j is nearer to e than to the base
    |cos(delta_j - delta_e, delta_e)| < ACROSS            and from e on it goes another way

and of no other expert that is true. The second line tells it from experts that merely share much of their change: those
point backwards from one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..checkpoints.reader import Checkpoint
from ..engine.work import Work
from ..experts.aligned import Aligned
from ..experts.source import FileSource, Slot, Source

__all__ = ["of_digests", "of_values"]

NEARER, ACROSS = 0.8, 0.25
MATRICES, ENTRIES = 8, 1 << 18  # read of each model
_ORIGINAL = "openai/whisper-"


def of_digests(
    base: Checkpoint, experts: Sequence[Checkpoint], hashes: Mapping[Checkpoint, Mapping[str, str]]
) -> list[str]:
    """Notices about files with equal digests, and about an original Whisper among the experts."""
    found = []
    first: dict[tuple[str, ...], str] = {}
    for expert in experts:
        other = first.setdefault(tuple(sorted(hashes[expert].values())), expert.name)
        if other != expert.name:
            found.append(f"{expert.name} has the same weights as {other}: their files are equal")
        if (expert.hub_id or "").startswith(_ORIGINAL) and base not in experts:
            found.append(
                f"{expert.name}: {expert.hub_id} is an original Whisper, not a fine-tuned one: is it the base?"
            )
    return found


def of_values(sources: Sequence[Source], works: Sequence[Work]) -> list[str]:
    """Notices about experts that equal the base, and about one that looks like the base. `sources`: base, experts."""
    base, *others = sources
    experts = [source for source in others if _from_files(source)]  # the others know their base
    gram = _gram(base, experts, _sample(works))
    unchanged = [e for e in range(len(experts)) if gram[e, e] == 0 and _equal(base, experts[e])]
    found = [f"{experts[e].name} has the same weights as the base: it adds nothing" for e in unchanged]
    if len(experts) == len(others) > 1 and (center := _center(gram)) is not None:
        name = experts[center].name
        found.append(
            f"every other expert is nearer to {name} than to the base: if they were trained from {name}, it is the base"
        )
    return found


def _from_files(source: Source) -> bool:
    return isinstance(source.inner if isinstance(source, Aligned) else source, FileSource)


def _sample(works: Sequence[Work]) -> list[Work]:
    matrices = [work for work in works if work.spec.floating and len(work.spec.shape) == 2 and work.spec.numel]
    matrices = [work for work in matrices if work.matrix] or matrices
    step = -(-len(matrices) // MATRICES) or 1
    return matrices[step // 2 :: step]


def _gram(base: Source, experts: Sequence[Source], sample: Sequence[Work]) -> np.ndarray:
    """<delta_i, delta_j> over the sampled entries."""
    gram = np.zeros((len(experts), len(experts)))
    slot = Slot()
    for work in sample:
        size = min(work.spec.numel, ENTRIES)
        origin = base.fetch(work.name, 0, size, slot).astype(np.float32)
        deltas = np.empty((len(experts), size), np.float32)
        for row, expert in zip(deltas, experts, strict=True):
            row[:] = expert.fetch(work.name, 0, size, slot)
        with np.errstate(invalid="ignore", over="ignore"):
            deltas -= origin
            gram += deltas @ deltas.T
    return gram


def _center(gram: np.ndarray) -> int | None:
    """The one expert that all others lie around; of equally similar experts that is true of each, so of none."""
    count = len(gram)
    found = [e for e in range(count) if all(_lies_around(gram, e, j) for j in range(count) if j != e)]
    return found[0] if len(found) == 1 else None


def _lies_around(gram: np.ndarray, e: int, j: int) -> bool:
    """Whether j lies around e rather than around the base."""
    own, other, inner = gram[e, e], gram[j, j], gram[e, j]
    apart = own + other - 2 * inner
    if not (own > 0 and apart > 1e-6 * other > 0):  # equal, or not finite
        return False
    return bool(apart < NEARER * other and abs(inner - own) < ACROSS * np.sqrt(apart * own))


def _equal(base: Source, expert: Source) -> bool:
    slots = Slot(), Slot()
    for name, spec in base.tensors.items():
        for start in range(0, spec.numel, ENTRIES):
            stop = min(spec.numel, start + ENTRIES)
            ours, theirs = (
                source.fetch(name, start, stop, slot) for source, slot in zip((base, expert), slots, strict=True)
            )
            if not np.array_equal(ours, theirs):
                return False
    return True
