"""The tables of an experiment for papers (LaTeX, with booktabs) and for other programs (CSV)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .criterion import METRIC
from .shown import named

__all__ = ["comparisons_csv", "latex", "scores_csv"]

_METRICS = ("wer", "wer_raw", "cer", "bleu", "chrf")
_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    **{character: "\\" + character for character in "&%$#_{}"},
}  # fmt: skip


def scores_csv(results: Mapping[str, Any]) -> str:
    """A row per model, task, language and metric, means over the seeds; languages "experts" and "others" are the means over
    these, of the task's own metric; "normalised" is over all tasks. sd: over the seeds, where it is known."""
    rows: list[Sequence[Any]] = []
    for label, model in results["models"].items():
        for cell, scores in model["cells"].items():
            rows += [(label, *cell.split("/"), metric, scores[metric], "") for metric in _METRICS if metric in scores]
        for group, spread in model["means"].items():
            task, languages = group.split("/")
            rows.append((label, task, languages, METRIC[task], spread["mean"], _known(spread["sd"])))
        share = model["normalised"]
        rows.append((label, "", "experts", "normalised", share["mean"], _known(share["sd"])))
    return _csv(("model", "task", "language", "metric", "value", "sd"), rows)


def comparisons_csv(results: Mapping[str, Any]) -> str:
    """A row per comparison, with both intervals and p before and after Holm's correction."""
    names = ("low", "high", "seeds_low", "seeds_high", "p", "p_holm")
    rows = [
        (c["merge"], results["config"]["against"], c["task"], c["group"], c["metric"], c["difference"])
        + tuple(_known(c[name]) for name in names)
        for c in results["comparisons"]
    ]
    return _csv(("merge", "against", "task", "languages", "metric", "difference", *names), rows)


def _known(value: float | None) -> float | str:
    return "" if value is None else value


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()


def latex(results: Mapping[str, Any]) -> str:
    r"""A tabular for each task, one of the comparisons; to be \input after \usepackage{booktabs}."""
    config = results["config"]
    parts = [f"% lors experiment {_plain(config['name'])}: \\usepackage{{booktabs}}"]
    groups = [
        group
        for group in ("experts", "others")
        if f"{config['tasks'][0]}/{group}" in results["models"]["base"]["means"]
    ]
    for task in config["tasks"]:
        rows = []
        for label, model in results["models"].items():
            if label.startswith("expert "):
                continue
            cells = [
                _number(model["cells"].get(f"{task}/{code}", {}).get(METRIC[task])) for code in config["languages"]
            ]
            rows.append(
                [_escaped(label), *cells, *(_spread(model["means"].get(f"{task}/{group}")) for group in groups)]
            )
        parts += [
            "",
            f"% {task}: {METRIC[task].upper()}; means over languages with an expert"
            + ", and without" * (len(groups) > 1),
        ]
        parts += _tabular(["model", *map(_escaped, config["languages"]), *groups], rows)
    rows = [
        [
            _escaped(named(results, c["merge"])),
            c["task"],
            c["group"],
            f"${c['difference']:+.2f}$",
            *_ends(c),
            f"{c['p_holm']:.2g}",
        ]
        for c in results["comparisons"]
    ]
    if rows:
        parts += [
            "",
            f"% minus {_plain(config['against'])}; 95 % over utterances, and over seeds where there are several; p after Holm",
        ]
        parts += _tabular(["merge", "task", "languages", "difference", "95\\,\\%", "over seeds", "$p$"], rows)
    return "\n".join(parts) + "\n"


def _ends(c: Mapping[str, Any]) -> list[str]:
    sides = ("", "seeds_")
    return ["–" if c[f"{s}low"] is None else f"$[{c[f'{s}low']:+.2f}, {c[f'{s}high']:+.2f}]$" for s in sides]


def _tabular(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [" & ".join(row) + r" \\" for row in rows]
    columns = "l" + "r" * (len(header) - 1)
    return [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(header) + r" \\",
        r"\midrule",
        *lines,
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _number(value: float | None) -> str:
    return "--" if value is None else f"{value:.1f}"


def _spread(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return "--"
    return f"{spread['mean']:.1f}" + (rf" $\pm$ {spread['sd']:.1f}" if spread["sd"] is not None else "")


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in _plain(text))


def _plain(text: str) -> str:
    """On one line."""
    return " ".join(text.split())
