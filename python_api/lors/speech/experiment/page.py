"""``report.html``: tables, curves and spectra of an experiment on one page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ...webpage import document, escape
from ..data.left_out import LeftOut
from .criterion import CRITERIA, METRIC, Criterion
from .shown import ALPHA, UNIT, edges, interval, named, plus_minus, task_table, verdict

__all__ = ["page"]

_COLOURS = (  # one for each row of a comparison of all methods
    *("#0b62a4", "#c0392b", "#1e8449", "#8e44ad", "#b9770e", "#117a8b", "#5d6d7e", "#a93276"),
    *("#7fb3d5", "#f1948a", "#7dcea0", "#c39bd3", "#f8c471", "#76d7c4", "#aeb6bf", "#4a235a"),
)
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#1c2833}
table{border-collapse:collapse;margin:.6rem 0 1.2rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .65rem;text-align:right;border-bottom:1px solid #e5e8e8}th{background:#f4f6f6}
td:first-child,th:first-child{text-align:left}tr.merge td:first-child{font-weight:600}
.note{color:#566573}svg{background:#fff;border:1px solid #e5e8e8;margin:.3rem .6rem .3rem 0}
.wrap{overflow-x:auto}code{background:#f4f6f6;padding:0 .2rem}
"""


def page(results: Mapping[str, Any]) -> str:
    config = results["config"]
    body = [
        f"<h1>Merging experiment <em>{escape(config['name'])}</em></h1>",
        _setting(results),
        *(_tests(results, task) for task in config["tasks"]),
        _normalised(results),
        _comparisons(results),
        _grids(results),
        _rest(results),
        _spectra(results),
        _reading(results),
    ]
    content = "\n".join(part for part in body if part)
    return document(f"LoRS experiment {config['name']}", _STYLE, f"<body>\n{content}\n</body>")


def _setting(results: Mapping[str, Any]) -> str:
    config = results["config"]
    data = config["data"]
    speech = (
        f"synthetic speech (espeak-ng, condition {escape(data['synth']['condition'])}), {data['train']} training "
        f"utterances per language"
        if data["synth"]
        else escape(str(data["source"]))
    )
    settings = {len(grid["tried"]) for grid in results["grids"].values()}
    reference = results.get("reference")
    words = ""
    if reference:
        words = (
            f" The merge by the fast kernels and by the reference gave different words in {reference['differing']} of "
            f"{reference['utterances']} test answers."
        )
    return (
        f"<p>Base <code>{escape(config['base'])}</code>; {speech}; experts {escape(', '.join(config['experts']))}{_each(config)}; tasks "
        f"{', '.join(config['tasks'])}; seeds {', '.join(map(str, config['seeds']))}; "
        f"{sum(results['utterances'].values())} test "
        f"answers per model, {results['dropped']} empty references dropped{escape(_without(results))}. Tensors that a method does not decompose: "
        f"<code>{escape(config['rest'])}</code>{_with_factor(config)}. Every method was tried with "
        f"{' or '.join(map(str, sorted(settings)))} settings on dev, the best by {_judge(results).called} went to test, "
        f"once.{words}{escape(_calibrated(config))}</p>"
    )


def _judge(results: Mapping[str, Any]) -> Criterion:
    return CRITERIA[results["config"]["criterion"]]


def _with_factor(config: Mapping[str, Any]) -> str:
    factors = config["rest_lambda"]
    return f" with a factor of its own for every method, {', '.join(map(str, factors))}" if factors else ""


def _calibrated(config: Mapping[str, Any]) -> str:
    seen = [f"{label} on {grid['calibrated']}" for label, grid in config["grids"].items() if grid["calibrated"]]
    return f" Calibrated: {'; '.join(seen)}." if seen else ""


def _each(config: Mapping[str, Any]) -> str:
    return ", one for each task" if config["experts_per"] == "language_task" else ""


def _table(rows: Sequence[Sequence[str]], merges: Iterable[str] = ()) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    chosen = set(merges)
    lines = []
    for row in rows[1:]:
        kind = ' class="merge"' if row[0].removesuffix(" (calibrated)") in chosen else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="wrap"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _tests(results: Mapping[str, Any], task: str) -> str:
    labels = [
        "base",
        "own expert",
        *results["grids"],
        *(n for n in ("multi_task", "sequential") if n in results["models"]),
    ]
    bars = _bars(results, task, labels)
    return (
        f"<h2>Test: {task} ({UNIT[task]})</h2>{_table(task_table(results, task), results['grids'])}{bars}"
        '<p class="note">“own expert” answers each language with the expert of that language; “others” are languages '
        "without an expert. ± is the standard deviation over seeds.</p>"
    )


def _bars(results: Mapping[str, Any], task: str, labels: Sequence[str]) -> str:
    languages = results["config"]["languages"]
    values = {
        (label, language): results["models"][label]["cells"].get(f"{task}/{language}", {}).get(METRIC[task])
        for label in labels
        for language in languages
    }
    top = max([v for v in values.values() if v is not None] or [1.0]) or 1.0
    bar = max(5, min(9, 1000 // (len(languages) * (len(labels) + 2))))
    width, height = 60 + len(languages) * (len(labels) * bar + 14), 210
    parts = [f'<svg width="{width}" height="{height + 20 + 16 * len(labels)}" role="img">']
    for row, label in enumerate(labels):
        y = height + 22 + 16 * row
        parts.append(f'<rect x="10" y="{y}" width="10" height="10" fill="{_COLOURS[row % len(_COLOURS)]}"/>')
        parts.append(f'<text x="26" y="{y + 9}" font-size="11">{escape(label)}</text>')
    for i, language in enumerate(languages):
        x = 40 + i * (len(labels) * bar + 14)
        parts.append(f'<text x="{x}" y="{height + 12}" font-size="11">{escape(language)}</text>')
        for row, label in enumerate(labels):
            value = values[label, language]
            if value is not None:
                tall = (height - 20) * value / top
                parts.append(
                    f'<rect x="{x + row * bar}" y="{height - tall:.1f}" width="{bar - 1}" height="{tall:.1f}" '
                    f'fill="{_COLOURS[row % len(_COLOURS)]}"><title>{escape(f"{label} {language}")}: '
                    f"{value:.1f}</title></rect>"
                )
    parts.append(
        f'<text x="2" y="16" font-size="11">{top:.0f}</text><text x="2" y="{height}" font-size="11">0</text></svg>'
    )
    return '<div class="wrap">' + "".join(parts) + "</div>"


def _without(results: Mapping[str, Any]) -> str:
    told = LeftOut(**results["left_out"]).told()
    return f", {told}" if told else ""


def _normalised(results: Mapping[str, Any]) -> str:
    rows = [["model", "normalised performance", "95 %"]]
    for label, model in results["models"].items():
        if not label.startswith("expert "):
            share = model["normalised"]
            rows.append([named(results, label), plus_minus(share), f"{share['low']:.2f} to {share['high']:.2f}"])
    flat = sorted({cell for model in results["models"].values() for cell in model["normalised"]["flat"]})
    without = (
        f" Experts that gained nothing over the base, in at least one training: {', '.join(flat)}." if flat else ""
    )
    return (
        f"<h2>Normalised performance</h2>{_table(rows, results['grids'])}<p class='note'>What the model gained over the base, "
        "summed over the experts' languages, as a share of what each language's own expert gained; mean over the tasks. 0 is "
        "the base, 1 is as good as a model for each language. The interval: speakers, or utterances where the speakers are not "
        f"known, drawn within each language; the trainings as they are.{escape(without)}</p>"
    )


def _comparisons(results: Mapping[str, Any]) -> str:
    if not results["comparisons"]:
        return ""
    several = len(results["config"]["seeds"]) > 1
    rows = [
        [
            "merge",
            "task",
            "languages",
            "difference",
            "over utterances",
            *["over seeds too"] * several,
            "p",
            "p (Holm)",
            "",
        ]
    ]
    for c in results["comparisons"]:
        difference = f"{c['difference']:+.2f} {c['metric'].upper()}"
        intervals = [interval(c), interval(c, "seeds_")] if several else [interval(c)]
        group = "with an expert" if c["group"] == "experts" else "without an expert"
        rows.append(
            [
                named(results, c["merge"]),
                c["task"],
                group,
                difference,
                *intervals,
                f"{c['p']:.2g}",
                f"{c['p_holm']:.2g}",
                verdict(c),
            ]
        )
    return (
        f"<h2>Against {escape(results['config']['against'])}</h2>{_table(rows)}<p class='note'>95 % intervals of a "
        "paired bootstrap, means over the languages: test utterances drawn, then test utterances and seeds "
        "drawn. A few seeds make the second a rough figure, rather too narrow than too wide. p: from the wider of both; "
        f"Holm's correction is for the {len(rows) - 1} comparisons of this table, and “better” and “worse” mean that it is "
        f"below {ALPHA}.</p>"
    )


def _grids(results: Mapping[str, Any]) -> str:
    if not results["grids"]:
        return ""
    judge = _judge(results)
    rows = [["method", "setting", judge.called, "chosen by seed"]]
    for label, grid in results["grids"].items():
        for record in sorted(grid["tried"], key=lambda r: r["mean"], reverse=judge.higher):
            seeds = [str(c["seed"]) for c in grid["chosen"] if c["setting"] == record["setting"]]
            rows.append([label, _words(record["setting"]), _value(judge, record), ", ".join(seeds)])
    return f"<h2>What was tried on dev</h2>{_edge_note(results)}{_curves(results)}{_table(rows)}"


def _edge_note(results: Mapping[str, Any]) -> str:
    found = edges(results)
    said = f"lie at the edge of what was tried, and a better one may lie beyond: {'; '.join(found)}"
    return (
        f"<p><strong>{len(found)} choices {escape(said)}.</strong></p>"
        if found
        else "<p>No choice lies at an edge.</p>"
    )


def _value(judge: Criterion, spread: Mapping[str, Any]) -> str:
    """Shares have three digits."""
    if not judge.relative:
        return plus_minus(spread)
    return f"{spread['mean']:.3f}" + (f" ± {spread['sd']:.3f}" if spread["sd"] is not None else "")


def _words(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{'lambda' if name == 'lam' else name} {value}" for name, value in setting.items()) or "–"


def _curves(results: Mapping[str, Any]) -> str:
    """The criterion over lambda (logarithmic), for each method the best of its other parameters at every lambda."""
    judge = _judge(results)
    lines = _lambda_lines(results["grids"], max if judge.higher else min)
    if not lines:
        return ""
    points = [point for line in lines.values() for point in line]
    (left, right), (low, high) = ((min(v), max(v)) for v in zip(*points, strict=True))
    width, height = 560, 300

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / left) / (math.log(right / left) or 1.0)
        return 50 + (width - 70) * across, 20 + (height - 60) * (high - y) / ((high - low) or 1.0)

    def text(x: float, y: float, what: str, more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11"{more}>{escape(what)}</text>'

    parts = [f'<svg width="{width + 180}" height="{height}" role="img">', text(4, 12, judge.called)]
    parts += [text(4, 26, f"{high:.3g}"), text(4, height - 38, f"{low:.3g}")]
    parts += [text(width // 2, height - 6, "lambda")]
    for row, (label, line) in enumerate(lines.items()):
        colour = _COLOURS[row % len(_COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in line:
            title = f"<title>{escape(label)}: lambda {x}, {y:.4g}</title>"
            cx, cy = place(x, y)
            parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3" fill="{colour}">{title}</circle>')
        parts.append(text(width, 30 + 16 * row, label, f' fill="{colour}"'))
    for tick in (digit * 10.0**power for power in range(-6, 4) for digit in (1, 2, 5)):
        if left <= tick * 1.001 and tick <= right * 1.001:
            parts.append(text(place(tick, low)[0], height - 22, f"{tick:g}", ' text-anchor="middle"'))
    return "".join([*parts, "</svg>"])


def _lambda_lines(
    grids: Mapping[str, Any], best_of: Callable[[float, float], float]
) -> dict[str, list[tuple[float, float]]]:
    lines = {}
    for label, grid in grids.items():
        best: dict[float, float] = {}
        for record in grid["tried"]:
            lam = record["setting"].get("lam")
            if isinstance(lam, (int, float)) and lam > 0:  # no list over the depth
                best[lam] = best_of(best.get(lam, record["mean"]), record["mean"])
        if len(best) > 1:
            lines[label] = sorted(best.items())
    return lines


def _rest(results: Mapping[str, Any]) -> str:
    by = results["config"]["criterion"]
    rows = [["method", "rest", _judge(results).called]]
    for label, grid in results["grids"].items():
        if grid["rest"]:
            tried = [grid["chosen"][0], *grid["rest"]]
            rows += [[label, record["setting"]["rest"], f"{record[by]:.4g}"] for record in tried]
    if len(rows) == 1:
        return ""
    return (
        f"<h2>The tensors that are not decomposed</h2>{_table(rows)}<p class='note'>Embeddings, convolutions, norms and "
        "biases merged by task arithmetic, averaged, or left at the base; each method at its best setting, first seed, "
        "dev. Methods that treat all tensors alike are not here.</p>"
    )


def _spectra(results: Mapping[str, Any]) -> str:
    rows: list[list[str]] = []
    for language, s in results["spectra"].items():
        if not rows:
            rows.append(
                [
                    "expert",
                    *(f"energy r={r}" for r in s["energy"]),
                    *(f"σ(r+1)/σ(r) r={r}" for r in s["ratio"]),
                    "share of |δ|² in matrices",
                ]
            )
        rows.append(
            [
                language,
                *(f"{v:.2f}" for v in s["energy"].values()),
                *(f"{v:.2f}" for v in s["ratio"].values()),
                f"{s['matrices_share']:.2f}",
            ]
        )
    return (
        f"<h2>Spectra of the task vectors</h2>{_table(rows)}<p class='note'>Share of a matrix's |δ|² in its "
        f"first r singular "
        "triplets and the ratio of neighbouring singular values, means over matrices; a ratio near 1 means "
        "that rank r cuts "
        "through a slope, not at a gap. Last column: how much of the whole |δ|² low rank and sparsity act on "
        "at all.</p>"
        if rows
        else ""
    )


def _reading(results: Mapping[str, Any]) -> str:
    synthetic = bool(results["config"]["data"]["synth"])
    limits = (
        "<p>The speech is synthetic, the vocabulary closed (dates and numbers), the model three orders of "
        "magnitude smaller than "
        "those in use: the experiment shows that the machinery works and how methods differ <em>here</em>, not "
        "what they do on "
        "real speech.</p>"
        if synthetic
        else ""
    )
    signatures = "".join(
        f"<li>{escape(name)}: <code>{escape(text)}</code></li>" for name, text in results["signatures"].items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    if results["machine"]["commit"]:
        versions += f"; summed up by commit {results['machine']['commit']}"
    return (
        f"<h2>How to read this</h2>{limits}<ul><li>WER: Whisper's normaliser on both sides, errors and "
        f"reference words summed over "
        f"the corpus; raw WER, CER, chrF++ are in <code>results.json</code>, every answer is in "
        f"<code>answers.jsonl.xz</code>, from which <code>lors experiment --score-again</code> computes all of this."
        f"</li>{signatures}<li>{escape(versions)}</li></ul>"
    )
