"""Decompositions of (tensor group, expert) pairs as tasks of a Ray cluster.

A task reads its tensors itself, from paths that every node must see, and its factors come back through the object store;
selection and summation run where the command runs. Decompositions are deterministic, and every worker is told to use the
vector unit of the driver, so a merge has the same bits as a local one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..cluster import RETRIES, TICK_SECONDS, connected, environment, require_fitting, result_of
from ..errors import LorsError
from ..files.remote import is_url

__all__ = ["decompositions"]

GROUP_BYTES = 64 << 20  # weights of one task: a few hundred tasks for a large model, each far longer than its overhead
Factors = Callable[[str, str, int], "tuple[np.ndarray, np.ndarray] | None"]


class Wanted(NamedTuple):
    """One matrix to decompose: its name, the rank, and how many bytes are read for it."""

    name: str
    rank: int
    nbytes: int


def groups(wanted: Sequence[Wanted]) -> list[list[Wanted]]:
    """Consecutive matrices of about GROUP_BYTES together."""
    found: list[list[Wanted]] = [[]]
    for item in wanted:
        if found[-1] and sum(other.nbytes for other in found[-1]) + item.nbytes > GROUP_BYTES:
            found.append([])
        found[-1].append(item)
    return [group for group in found if group]


@contextlib.contextmanager
def decompositions(
    address: str,
    base: str,
    experts: Mapping[str, str],
    wanted: Mapping[str, Sequence[Wanted]],
    *,
    seed: int,
    backend: str | None,
    cpus: int,
    stop: threading.Event,
) -> Iterator[Factors]:
    """Starts the decomposition of all wanted matrices; the function that is yielded waits for the one it is asked for.

    experts: label -> path or URL. wanted: label -> matrices. All paths must be there on every node. stop: nothing is waited
    for any more when it is set.
    """
    with connected(address, cpus) as ray:
        task = ray.remote(num_cpus=1, max_retries=RETRIES, runtime_env=environment())(decompose_group)
        references: dict[tuple[str, str], tuple[Any, int]] = {}
        # Tensor by tensor over all experts, as the merge will ask for them.
        parts = {label: groups(items) for label, items in wanted.items()}
        largest = max((item.nbytes for items in wanted.values() for item in items), default=0)
        require_fitting(ray, 1, 0, 4 * max(largest, GROUP_BYTES))
        for number in range(max(map(len, parts.values()), default=0)):
            for label in (label for label in parts if number < len(parts[label])):
                group = parts[label][number]
                weights = 4 * sum(item.nbytes for item in group)
                reference = task.options(memory=weights).remote(base, label, experts[label], group, seed, backend)
                references |= {(label, item.name): (reference, place) for place, item in enumerate(group)}

        def factors(expert: str, name: str, rank: int) -> tuple[np.ndarray, np.ndarray] | None:
            if (expert, name) not in references:
                return None
            reference, place = references[expert, name]
            while not ray.wait([reference], timeout=TICK_SECONDS)[0]:
                if stop.is_set():
                    raise LorsError(f"{expert}: tensor {name!r}: the merge was given up")
            left, right = result_of(ray, reference)[place]
            if left.shape[1] < rank:
                return None
            return np.ascontiguousarray(left[:, :rank]), np.ascontiguousarray(right[:, :rank])

        try:
            yield factors
        finally:
            for reference in {id(r): r for r, _ in references.values()}.values():
                ray.cancel(reference, force=False)


def decompose_group(
    base: str, label: str, expert: str, group: Sequence[Wanted], seed: int, backend: str | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(left, right) of every matrix of a group; runs on a worker."""
    import lors_kernels
    from lors_kernels import FactorOverflowError, NonFiniteError

    from ..experts.source import Slot

    origin, tuned = _source(base, base, "base"), _source(expert, base, label)
    found, slots = [], (Slot(), Slot())
    for item in group:
        shape = origin.tensors[item.name].shape
        size = origin.tensors[item.name].numel
        before, after = (
            source.fetch(item.name, 0, size, slot).reshape(shape)
            for source, slot in zip((origin, tuned), slots, strict=True)
        )
        try:
            svd = lors_kernels.truncated_svd(before, after, item.rank, seed=seed, backend=backend, threads=1)
        except NonFiniteError as error:
            raise LorsError(
                f"{label}: tensor {item.name!r}: expected a finite difference to the base, got {error.count} NaN or infinite entries"
            ) from None
        except FactorOverflowError as error:
            raise LorsError(f"{label}: tensor {item.name!r}: {error}") from None
        found.append((svd.left, svd.right))
    return found


@cache
def _source(path: str, base: str, label: str) -> Any:
    """Opened once per worker."""
    from ..checkpoints.reader import open_checkpoint
    from ..experts.source import FileSource

    if not is_url(path) and not os.path.exists(path):
        raise LorsError(f"--ray: {path}: not there on node {socket.gethostname()}; every node must see the inputs")
    names = None if path == base else list(open_checkpoint(base, name="base").tensors)
    return FileSource(open_checkpoint(path, name=label), names)
