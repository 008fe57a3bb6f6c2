"""The interference report as one HTML page, beginning with what stands out, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import LorsError
from ..files.file import OutputFile
from ..files.replaceable import PAGE, RESULTS
from ..pages import charts, colours, html
from ..recipes.parameters import rank_of
from .interference import Interference, MatrixRow

__all__ = ["findings", "output_files", "render"]

# What pairwise numbers are for unrelated experts; the texts compare with these.
NOTABLE_COSINE, NOTABLE_CONFLICT, NOTABLE_NORM = 0.2, 0.55, 1.5


def output_files(path: Path, force: bool) -> tuple[OutputFile, OutputFile]:
    """Where the page and, beside it, its numbers go; LorsError when they cannot."""
    if path.suffix != ".html":
        raise LorsError(f"{path}: expected a name that ends in .html for the report")
    return OutputFile(path, PAGE, force=force), OutputFile(path.with_suffix(".json"), RESULTS, force=force)


def findings(report: Interference) -> list[str]:
    """What stands out, in sentences."""
    low, sparse = report.shares(report.matrices)
    found = []
    found.append(
        f"Rank {report.rank:g} keeps {100 * low:.0f} % of the task vectors' energy, and the largest {100 * report.density:g} % of "
        f"what is left another {100 * sparse:.0f} %; {100 * max(0.0, 1 - low - sparse):.0f} % is lost."
    )
    kinds = {kind: report.shares(rows)[0] for kind, rows in report.by(lambda row: row.kind).items()}
    most, least = max(kinds, key=lambda k: kinds[k]), min(kinds, key=lambda k: kinds[k])
    if kinds[most] - kinds[least] > 0.05:
        found.append(
            f"Low rank suits {most} best ({100 * kinds[most]:.0f} % in L) and {least} least ({100 * kinds[least]:.0f} %)."
        )
    norms = dict(zip(report.experts, report.norms(), strict=True))
    middle = float(np.median(list(norms.values())))
    for name, norm in norms.items():
        if middle and norm > NOTABLE_NORM * middle:
            found.append(
                f"{name} moved {norm / middle:.1f} times as far as the median expert: a smaller weight would balance it."
            )
        elif middle and norm < middle / NOTABLE_NORM:
            found.append(f"{name} moved only {norm / middle:.2f} times as far as the median expert.")
    if report.pairs:
        found += _pair_findings(report)
    return found


def _pair_findings(report: Interference) -> list[str]:
    cosine = report.cosine()
    high, low = max(cosine, key=lambda p: cosine[p]), min(cosine, key=lambda p: cosine[p])
    if cosine[high] >= NOTABLE_COSINE:
        found = [f"{_and(high)} have most in common (cosine {cosine[high]:.2f}): their sum counts that part twice."]
    else:
        found = [f"No two experts point the same way: the largest cosine is {cosine[high]:.2f}, between {_and(high)}."]
    if cosine[low] < -0.05:
        found.append(f"{_and(low)} pull against each other (cosine {cosine[low]:.2f}).")
    conflict = report.mean("conflict")
    worst = max(conflict, key=lambda p: conflict[p])
    row = max(report.matrices, key=lambda row: row.conflict[worst])
    verdict = "more than chance" if conflict[worst] > NOTABLE_CONFLICT else "no more than chance, one half"
    if conflict[worst] < 1 - NOTABLE_CONFLICT:
        verdict = "less than chance, one half: they mostly agree"
    found.append(
        f"Where the sparse parts of {_and(worst)} meet, {100 * conflict[worst]:.0f} % of the signs differ, the most of all pairs "
        f"({verdict}); the most in one matrix is {100 * row.conflict[worst]:.0f} %, in {row.name}."
    )
    left = report.mean("left")
    shared = max(left, key=lambda p: left[p])
    ranks = [(rank_of(report.rank, *row.shape), row.shape[0]) for row in report.matrices]
    chance = float(np.mean([rank / rows for rank, rows in ranks]))
    found.append(
        f"The low-rank subspaces of {_and(shared)} overlap most: {100 * left[shared]:.0f} % of the left one is shared, where "
        f"unrelated ones would share {100 * chance:.0f} %."
    )
    return found


def _and(pair: str) -> str:
    return pair.replace(", ", " and ")


def render(report: Interference) -> str:
    """The page."""
    names = ", ".join(report.experts)
    lead = f"{len(report.experts)} experts ({names}), {len(report.matrices)} matrices, rank {report.rank:g}, density {report.density:g}."
    sections = [html.findings(findings(report))]
    if report.pairs:
        sections.append(html.section("pairs", "Pairs of experts", *_pairs(report)))
    sections += [
        html.section("layers", "By layer", html.charts(_layers(report))),
        html.section("kinds", "By kind of matrix", _kinds(report)),
        html.section("spectra", "Spectra", html.charts(_spectra(report))),
        html.section("matrices", "Every matrix", _details(report)),
    ]
    return html.page("Interference report", lead, sections)


def _pairs(report: Interference) -> list[str]:
    cosine = report.cosine()
    norms = dict(zip(report.experts, report.norms(), strict=True))

    def value(a: str, b: str) -> float:
        return 1.0 if a == b else cosine.get(f"{a}, {b}", cosine.get(f"{b}, {a}", 0.0))

    matrix = {f"{a} (norm {norms[a]:.3g})": [value(a, b) for b in report.experts] for a in report.experts}
    measures = {name: report.mean(name) for name in ("left", "right", "support", "conflict")}
    rows = {pair: [cosine[pair], *(measures[name][pair] for name in measures)] for pair in report.pairs}
    density = report.density
    note = (
        "For unrelated experts: cosine near 0, subspaces near rank / size, support "
        f"{density / (2 - density):.2f}, sign conflict 0.50. Means over matrices; cosine over all of them together."
    )
    head = ("cosine", "left subspace", "right subspace", "support overlap", "sign conflict")
    return [
        html.heat_table("Cosine of the task vectors", report.experts, matrix, span=(0, 1)),
        html.heat_table("Pairs", head, rows, span=(0, 1)),
        html.note(note),
    ]


def _stack(row: MatrixRow) -> str:
    return "decoder" if "decoder" in row.name else "encoder" if "encoder" in row.name else "layers"


def _layers(report: Interference) -> Iterator[str]:
    groups = report.by(lambda row: (_stack(row), row.layer))
    for stack in dict.fromkeys(stack for stack, _ in groups):
        here = {layer: rows for (name, layer), rows in sorted(groups.items()) if name == stack}
        norms = {
            expert: [(float(layer), sum(row.norm[i] ** 2 for row in rows) ** 0.5) for layer, rows in here.items()]
            for i, expert in enumerate(report.experts)
        }
        yield _figure(f"Norm of the task vectors, {stack}", norms, "layer", "Frobenius norm")
        if report.pairs:
            curves = {
                title: [
                    (float(layer), float(np.mean(list(report.mean(name, rows).values()))))
                    for layer, rows in here.items()
                ]
                for title, name in (("cosine", "cosine"), ("left subspace", "left"), ("sign conflict", "conflict"))
            }
            yield _figure(f"Interference, mean of all pairs, {stack}", curves, "layer", "share")


def _figure(caption: str, series: charts.Series, x: str, y: str) -> str:
    """Curves over whole numbers, and the same numbers as a table."""
    places = sorted({at for points in series.values() for at, _ in points})
    known = {name: dict(points) for name, points in series.items()}
    rows = [[f"{at:g}", *(f"{of[at]:.4g}" if at in of else "" for of in known.values())] for at in places]
    drawn = charts.lines(series, colours.of_names(series), x, y)
    return html.figure(caption, drawn, html.table(f"{caption}: {y}", (x, *series), rows))


def _kinds(report: Interference) -> str:
    rows = {}
    for kind, group in report.by(lambda row: row.kind).items():
        low, sparse = report.shares(group)
        ranks = float(np.mean([value for row in group for value in row.effective_rank]))
        pairs = (
            [float(np.mean(list(report.mean(name, group).values()))) for name in ("cosine", "left", "conflict")]
            if report.pairs
            else []
        )
        rows[f"{kind} ({len(group)})"] = [low, sparse, max(0.0, 1 - low - sparse), ranks / min(group[0].shape), *pairs]
    head = (
        "energy in L",
        "in S",
        "lost",
        "effective rank / full",
        *(("cosine", "left subspace", "sign conflict") if report.pairs else ()),
    )
    return html.heat_table("Kinds of matrices (how many of each)", head, rows, span=(0, 1))


def _spectra(report: Interference) -> Iterator[str]:
    """Mean singular values of each kind, relative to the largest, a line per expert."""
    for kind, group in report.by(lambda row: row.kind).items():
        curves = {}
        for i, expert in enumerate(report.experts):
            spectra = [np.array(row.sigma[i]) / row.sigma[i][0] for row in group if row.sigma[i][0] > 0]
            if spectra:
                mean = np.mean([spectrum[: min(map(len, spectra))] for spectrum in spectra], axis=0)
                curves[expert] = [(float(k), float(value)) for k, value in enumerate(mean, start=1)]
        yield _figure(f"Singular values, {kind}", curves, "i", "singular value i / largest")


def _details(report: Interference) -> str:
    def mean(values: Sequence[float]) -> str:
        return f"{float(np.mean(values)):.2f}" if values else "–"

    rows = [
        (
            row.name,
            f"{row.shape[0]} × {row.shape[1]}",
            f"{100 * float(np.mean(row.relative)):.2f} %",
            mean(row.low),
            mean(row.sparse),
            f"{float(np.mean(row.effective_rank)):.1f}",
            mean(list(row.cosine.values())),
            mean(list(row.left.values())),
            mean(list(row.right.values())),
            mean(list(row.support.values())),
            mean(list(row.conflict.values())),
        )
        for row in report.matrices
    ]
    head = (
        "matrix", "shape", "norm / base", "in L", "in S", "effective rank", "cosine", "left", "right", "support", "conflict",
    )  # fmt: skip
    shown = html.table("Means over experts and pairs; the JSON file has each", head, rows)
    return f"<details><summary>{len(rows)} matrices</summary>{shown}</details>"
