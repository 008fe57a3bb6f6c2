"""Every kernel operation of every backend that is there against its definition, on the shared cases, on this machine."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from .. import dispatch
from .cases import CASES, Case, hard_spectra
from .checks import CHECKS, Finding, Place

SLOW = 10_000  # entries above which the reference, whose plain torch takes seconds, is left to the tests


@dataclass
class Check:
    """An operation of a backend on a case, by the finding that came nearest to what is allowed, or went farthest beyond."""

    backend: str
    operation: str
    case: str
    ok: bool
    aspect: str
    error: float
    allowed: float
    seconds: float


def checks(backend: str, cases: Sequence[Case] = CASES, operations: Sequence[str] = tuple(CHECKS)) -> Iterator[Check]:
    """Runs the operations that a backend has on every case."""
    place = Place(backend)
    for case in cases:
        for operation in operations:
            if place.runs(operation, case):
                yield _check(place, operation, case)


def _check(place: Place, operation: str, case: Case) -> Check:
    begun = time.perf_counter()
    findings: list[Finding] = []
    try:
        findings += CHECKS[operation](place, case)
    except Exception as error:  # what raises is wrong too, and the others are still to be checked
        findings.append(Finding(f"{type(error).__name__}: {error}".splitlines()[0], math.inf))
    worst = max(findings, key=lambda finding: (not finding.ok, finding.share))
    seconds = time.perf_counter() - begun
    return Check(
        place.backend, operation, case.name, bool(worst.ok), worst.aspect, float(worst.error), float(worst.allowed), seconds
    )  # fmt: skip


def validate_command(backends: list[str] | None, *, quick: bool = False, as_json: bool = False) -> bool:
    """Prints a table and returns whether everything is right. A backend asked for by name must be available, one that is
    broken is wrong, and so is nothing to check."""
    known, names = dispatch.available_backends(), dispatch.named_or_available(backends)
    cases = tuple(case for case in (*CASES, *hard_spectra()) if not (quick and case.large))
    small = tuple(case for case in cases if case.matrices()[1].size <= SLOW)
    results = [check for name in names for check in checks(name, small if name == "reference" else cases)]
    broken = [] if backends else [name for name, status in known.items() if status.broken]
    if as_json:
        print(json.dumps([asdict(check) for check in results], indent=2))
    else:
        _print_table(results)
    for name, status in known.items():
        if name not in names and not backends:
            print(f"{name}: {status.state}: {status.reason}", file=sys.stderr)
    if not results:
        print("nothing was checked", file=sys.stderr)
    return bool(results) and not broken and all(check.ok for check in results)


def _print_table(results: list[Check]) -> None:
    print(f"{'backend':10} {'operation':20} {'cases':>5} {'wrong':>5} {'error':>8} {'allowed':>8} {'seconds':>8}  of")
    for backend, operation in dict.fromkeys((check.backend, check.operation) for check in results):
        group = [check for check in results if (check.backend, check.operation) == (backend, operation)]
        worst = max(group, key=lambda check: (not check.ok, Finding("", check.error, check.allowed).share))
        wrong = [check for check in group if not check.ok]
        seconds = sum(check.seconds for check in group)
        print(
            f"{backend:10} {operation:20} {len(group):5} {len(wrong):5} {worst.error:8.1e} {worst.allowed:8.1e} "
            f"{seconds:8.1f}  {worst.aspect}"
        )
        for check in wrong:
            print(f"  WRONG {check.case}: {check.aspect}: error {check.error:.2e}, allowed {check.allowed:.2e}")
