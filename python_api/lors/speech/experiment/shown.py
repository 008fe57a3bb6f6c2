"""What tables say of the numbers: rows of texts, verdicts, choices at an edge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .criterion import METRIC

__all__ = ["ALPHA", "UNIT", "edges", "interval", "named", "number", "plus_minus", "task_table", "verdict", "verdicts"]

ALPHA = 0.05
UNIT = {"transcribe": "WER, %; lower is better", "translate": "BLEU; higher is better"}


def named(results: Mapping[str, Any], label: str) -> str:
    """The model in a table, where a merge that saw speech of the languages is told from those that saw none."""
    grid = results["config"]["grids"].get(label)
    return f"{label} (calibrated)" if grid and grid["calibrated"] else label


def task_table(results: Mapping[str, Any], task: str) -> list[list[str]]:
    config = results["config"]
    groups = {"experts": "experts' mean", "others": "others' mean"}
    if not set(config["languages"]) - set(config["experts"]):
        del groups["others"]
    rows = [["model", *config["languages"], *groups.values()]]
    for label, model in results["models"].items():
        cells = [
            number(model["cells"].get(f"{task}/{language}", {}).get(METRIC[task])) for language in config["languages"]
        ]
        means = [plus_minus(model["means"].get(f"{task}/{group}")) for group in groups]
        rows.append([named(results, label), *cells, *means])
    return rows


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """One sentence per comparison, which says better, worse, or that the difference may be chance; choices at an edge."""
    lines = []
    for c in results["comparisons"]:
        over_seeds = f", {interval(c, 'seeds_')} over seeds too" if c["seeds_low"] is not None else ""
        lines.append(
            f"{named(results, c['merge'])} minus {results['config']['against']}, {c['task']}{_of_group(c)}: {c['difference']:+.2f} "
            f"{c['metric'].upper()} {interval(c)}{over_seeds}, p {c['p_holm']:.2g} (Holm): {verdict(c)}"
        )
    return lines + [f"at the edge of what was tried: {edge}" for edge in edges(results)]


def _of_group(c: Mapping[str, Any]) -> str:
    return " of languages without an expert" if c["group"] == "others" else ""


def edges(results: Mapping[str, Any]) -> list[str]:
    """Each choice beyond which a better one may lie."""
    return [
        f"{label}, seed {chosen['seed']}: {'lambda' if name == 'lam' else name} {chosen['setting'][name]}"
        for label, grid in results["grids"].items()
        for chosen in grid["chosen"]
        for name in chosen["edges"]
    ]


def interval(c: Mapping[str, Any], which: str = "") -> str:
    return f"[{c[which + 'low']:+.2f}, {c[which + 'high']:+.2f}]"


def verdict(c: Mapping[str, Any]) -> str:
    """After the correction for the number of comparisons."""
    if c["p_holm"] >= ALPHA:
        return "no difference beyond chance"
    return "better" if (c["difference"] < 0) == (c["metric"] == "wer") else "worse"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def plus_minus(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return "–"
    return f"{spread['mean']:.2f}" + (f" ± {spread['sd']:.2f}" if spread["sd"] is not None else "")
