"""The account of a merge: what came of each piece, and the sums over them in the report."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from ..checkpoints.layers import kind
from ..experts.source import Source
from ..methods.operands import Outcome
from .report import KindRow, MergeReport
from .work import Piece, Work


class Account:
    """Kept by all threads of a run. progress: called with the entries of each piece that is done, by one thread at a time."""

    def __init__(self, pieces: Sequence[Piece], progress: Callable[[int], None]) -> None:
        self.pieces, self._progress = pieces, progress
        self._outcomes: list[list[Outcome]] = [[] for _ in pieces]
        self._lock = threading.Lock()

    def done(self, index: int, outcomes: list[Outcome]) -> None:
        piece = self.pieces[index]
        with self._lock:
            self._outcomes[index] = outcomes
            self._progress(piece.stop - piece.start)

    def close(self, report: MergeReport, base: Source, experts: Sequence[Source]) -> None:
        """Adds everything up in the order of the pieces, so that the report does not depend on the threads either."""
        rows = dict[str, KindRow]()
        for piece, outcomes in zip(self.pieces, self._outcomes, strict=True):
            work, entries = piece.work, piece.stop - piece.start
            read = [e for e, r in zip(experts, work.reductions, strict=False) if r.weight]
            read += experts if work.combination else ()
            if work.relative or not read:
                read.append(base)
            report.bytes_read += sum(_bytes_read(source, work, entries) for source in read)
            report.bytes_written += entries * work.out_dtype.itemsize
            row = rows.setdefault(kind(work.name), KindRow(kind(work.name), work.matrix))
            row.tensors += piece.start == 0
            row.entries += entries
            for outcome in outcomes:
                _add(report, row, outcome)
        if report.svd_not_unique:
            report.notices.append(
                f"{report.svd_not_unique} of {sum(report.svd_methods.values())} decompositions are not unique: singular "
                "values are equal across the rank, and the seed decides which directions L keeps"
            )
        report.kinds = sorted(rows.values(), key=lambda row: (not row.decomposed, row.kind))
        report.tensors += sum(piece.start == 0 for piece in self.pieces)
        report.decomposed += sum(piece.work.matrix for piece in self.pieces)


def _add(report: MergeReport, row: KindRow, outcome: Outcome) -> None:
    stats, svd = outcome
    row.delta_energy += stats.delta_energy
    row.sparse_energy += stats.kept_energy
    row.low_energy += stats.delta_energy - stats.residual_energy
    if svd:
        report.svd_methods[svd.method] += 1
        report.svd_passes += svd.passes
        report.svd_worst = max(report.svd_worst, svd.residual if svd.unique else 0.0)
        report.svd_not_unique += not svd.unique


def _bytes_read(source: Source, work: Work, entries: int) -> int:
    if (parts := source.parts) is not None:
        return parts.stored_bytes(work.name) * entries // max(1, work.spec.numel)
    return entries * source.tensors[work.name].dtype.itemsize
