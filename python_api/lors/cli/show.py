"""Reports on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import LorsError, print_lines

if TYPE_CHECKING:
    from ..engine.report import KindRow, MergeReport


def tell_report(
    report: MergeReport, *, as_json: bool, quiet: bool, verbose: bool = False, rehearsal: bool = False
) -> None:
    """Prints a report; that it cannot be printed is no failure of what it reports."""
    try:
        if as_json:
            print(json.dumps(report.to_dict(), indent=2))
        elif not quiet:
            show_report(report, verbose, rehearsal)
        sys.stdout.flush()
    except LorsError as error:
        done = "the dry run passed" if rehearsal else f"{report.out} is complete"
        raise LorsError(f"{done}, but {error}") from error


def show_report(report: MergeReport, verbose: bool = True, rehearsal: bool = False) -> None:
    """The report as a table and three lines; of a rehearsal, which took no time and wrote nothing, without the last."""
    rows = [row for row in report.kinds if row.decomposed and row.delta_energy]  # none of a method without L and S
    if rows and verbose:
        _show_kinds(rows)
    elif rows:
        energy = sum(row.delta_energy for row in rows)
        low, sparse = (sum(getattr(row, name) for row in rows) / energy for name in ("low_energy", "sparse_energy"))
        print(
            f"energy of the task vectors kept: {100 * low:.1f} % in L, {100 * sparse:.1f} % in S (-v: per layer kind)"
        )
    for notice in report.notices:
        print_lines(f"note: {notice}")
    count = len(report.experts)
    print_lines(
        f"{report.method}: {count} expert{'s'[: count != 1]}, {report.tensors} tensors, {report.decomposed} decomposed, "
        f"backend {report.backend}, {report.threads} threads"
    )
    if rehearsal:
        return
    print_lines(
        f"{report.seconds:.2f} s, {report.gb_per_second:.2f} GB/s read and written, "
        f"peak memory {report.peak_memory / 1e6:.0f} MB" + (f" -> {report.out}" if report.out else "")
    )


def _show_kinds(rows: Sequence[KindRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer kind", *("matrices", "entries", "energy in L", "energy in S", "lost"), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        shares = (row.low_share, row.sparse_share, 1 - row.low_share - row.sparse_share)
        table.add_row(row.kind, str(row.tensors), f"{row.entries:,}", *(f"{100 * share:.1f} %" for share in shares))
    Console().print(table)
