"""A model with the token tables of a united vocabulary: its rows by token, and the same new rows in every model.

    W0[new] = W_t[new] = sum_s weight_s W_s[row of the token in s] / sum_s weight_s        over the experts s that have it

So new rows do not change in a merge, whatever its method: they are that mean.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..checkpoints.vocabulary import FRESH, OWN, Run
from ..errors import LorsError, shown
from .factors import Factors
from .source import Decomposed, Slot, Source, Spec

__all__ = ["Aligned", "FreshRows"]


class FreshRows:
    """The rows of tokens that the base lacks.

    experts: who has them. tokens, holders: each new token, and which experts have it at which row. weights: of the experts, for
    a table. dtypes: of the base's tables, to which rows are rounded: then no model differs from the base in them. Computed when a table is first asked for, and kept: as many rows as there are new tokens, in float32.
    """

    def __init__(
        self,
        experts: Sequence[Source],
        tokens: Sequence[str],
        holders: Sequence[Sequence[tuple[int, int]]],
        weights: Callable[[str], Sequence[float]],
        dtypes: Mapping[str, np.dtype[Any]] | None = None,
    ) -> None:
        self._experts, self._tokens, self._holders, self._weights = experts, tokens, holders, weights
        self._dtypes = dtypes or {}
        self._rows: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def require_weights(self, table: str) -> None:
        """LorsError unless every new token has a mean."""
        weights = self._weights(table)
        for token, holders in zip(self._tokens, self._holders, strict=True):
            found = [weights[expert] for expert, _ in holders]
            if not (min(found) >= 0 and sum(found) > 0):
                names = ", ".join(self._experts[expert].name for expert, _ in holders)
                raise LorsError(
                    f"vocabulary: token {shown(token)}: expected positive weights of the experts that have it ({names}), "
                    f"got {shown(found)}"
                )

    def of(self, table: str) -> np.ndarray:
        """[tokens, width] float32, flat."""
        with self._lock:
            if table not in self._rows:
                self._rows[table] = self._mean(table)
            return self._rows[table]

    def _mean(self, table: str) -> np.ndarray:
        weights, slot = self._weights(table), Slot()
        width = self._experts[0].tensors[table].numel // max(1, self._experts[0].tensors[table].shape[0])
        rows = np.zeros((len(self._tokens), width))
        for row, token, holders in zip(rows, self._tokens, self._holders, strict=True):
            used = [(self._experts[expert], place, weights[expert]) for expert, place in holders if weights[expert]]
            for expert, place, weight in used:
                values = expert.fetch(table, place * width, (place + 1) * width, slot).astype(np.float64)
                if not np.isfinite(values).all():
                    raise LorsError(
                        f"{expert.name}: tensor {table!r}: expected finite values in the row of {shown(token)}, got NaN "
                        f"or infinite ones"
                    )
                row += weight * values
            row /= sum(weight for _, _, weight in used)
        single = rows.astype(np.float32).ravel()
        return single.astype(self._dtypes.get(table, np.float32)).astype(np.float32)


class Aligned:
    """A source of which the token tables have the rows that `runs` says, in float32 unless `dtypes` has another type."""

    parts: Decomposed | None = None

    def __init__(
        self,
        inner: Source,
        base: Source,
        tables: frozenset[str],
        runs: Sequence[Run],
        fresh: FreshRows,
        dtypes: Mapping[str, np.dtype[Any]] | None = None,
    ) -> None:
        self.name, self.inner, self._base, self._runs, self._fresh = inner.name, inner, base, runs, fresh
        self._starts = [run.start for run in runs]
        rows = runs[-1].start + runs[-1].length
        wide = {name: np.dtype(np.float32) for name in tables} | dict(dtypes or {})
        self._tables = {
            name: Spec(wide[name], (rows, *spec.shape[1:])) for name, spec in inner.tensors.items() if name in tables
        }
        self.tensors: dict[str, Spec] = {name: self._tables.get(name, spec) for name, spec in inner.tensors.items()}

    def fetch(self, name: str, start: int, stop: int, slot: Slot) -> np.ndarray:
        if name not in self._tables:
            return self.inner.fetch(name, start, stop, slot)
        out = slot.array(stop - start, self._tables[name].dtype)
        for begin, values in self._parts_of(name, start, stop):
            out[begin - start : begin - start + values.size] = values
        return out

    def _parts_of(self, name: str, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first element, values) of a range of a table, run by run."""
        spec, slot = self._tables[name], Slot()
        width = spec.numel // max(1, spec.shape[0])
        number = bisect_right(self._starts, start // max(1, width)) - 1
        while start < stop:
            run = self._runs[number]
            end = min(stop, (run.start + run.length) * width)
            shift = (run.place - run.start) * width
            if run.origin == FRESH:
                values = self._fresh.of(name)[start + shift : end + shift]
            else:
                source = self.inner if run.origin == OWN else self._base
                values = source.fetch(name, start + shift, end + shift, slot)
            yield start, values
            start, number = end, number + 1

    def prefetch(self, name: str) -> None:
        self.inner.prefetch(name)

    def factors(self, name: str) -> Factors | None:
        """Of a table None: its difference to the base is found from its rows."""
        return None if name in self._tables else self.inner.factors(name)
