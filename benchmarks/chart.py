"""The README's chart: five fine-tuned whisper-small to one model, files to files, by seconds and by memory.

Drawn from the newest result of `merge` by `python -m benchmarks table --write`, once for light and once for dark pages.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from .errors import BenchmarkError
from .results import RESULTS, newest

CASE = "small float32, 5 experts"
ROWS = {  # command of the result -> what the chart calls it, and whether it is ours
    "lors": ("LoRS: low rank + sparse", True),
    "lors task arithmetic": ("LoRS: task arithmetic", True),
    "mergekit task arithmetic": ("mergekit: task arithmetic", False),
    "mergekit TIES": ("mergekit: TIES", False),
    "as released": ("the paper's procedure", False),
}
SCHEMES = {  # ground, text, ours, others
    "light": ("#ffffff", "#1f2328", "#3f51b5", "#a8b0ba"),
    "dark": ("#0d1117", "#e6edf3", "#9fa8da", "#5b6572"),
}

Row = tuple[str, bool, float, float]  # label, ours, seconds, GB


def rows(directory: Path = RESULTS) -> list[Row]:
    """The commands of the case that were measured."""
    result = newest("merge", directory)
    commands: dict[str, Any] = (result or {"results": {}})["results"].get(CASE, {}).get("commands", {})
    found = [
        (*ROWS[name], run["wall_s"]["median"], run["peak_rss"]["median"] / 1e9)
        for name, run in commands.items()
        if name in ROWS and "failed" not in run
    ]
    if not found:
        raise BenchmarkError(f"{directory.name}: expected a result of `merge` with {CASE!r}, got none")
    return sorted(found, key=lambda row: list(ROWS.values()).index((row[0], row[1])))


def labels(found: list[Row]) -> list[str]:
    """Every text beside a bar: names, seconds and GB."""
    numbers = [text for _, _, time, memory in found for text in (f"{time:.3g} s", f"{memory:.2f} GB")]
    return [*(row[0] for row in found), *numbers]


def path(scheme: str, directory: Path = RESULTS) -> Path:
    return directory / f"merge-{scheme}.svg"


def write(directory: Path = RESULTS) -> None:
    """Draws the chart for every scheme."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = rows(directory)
    for scheme, (ground, ink, ours, others) in SCHEMES.items():
        style = {
            "svg.fonttype": "none", "svg.hashsalt": "lors", "font.family": "sans-serif", "font.size": 11,
            "text.color": ink, "axes.edgecolor": ground, "ytick.color": ink, "figure.facecolor": ground,
            "axes.facecolor": ground,
        }  # fmt: skip
        with plt.rc_context(style):
            figure, panels = plt.subplots(1, 2, figsize=(8.6, 2.5), sharey=True)
            for panel, column, title in zip(panels, (2, 3), ("seconds", "peak memory"), strict=True):
                values = [row[column] for row in found]
                bars = panel.barh(
                    range(len(found)), values, color=[ours if row[1] else others for row in found], height=0.62
                )
                unit = "{:.3g} s" if column == 2 else "{:.2f} GB"
                panel.bar_label(bars, [unit.format(value) for value in values], padding=4, color=ink)
                panel.set_xlim(0, 1.25 * max(values))
                panel.set_xticks([])
                panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
                panel.tick_params(length=0)
                panel.spines[:].set_visible(False)
            panels[0].set_yticks(range(len(found)), [row[0] for row in found])
            panels[0].invert_yaxis()
            figure.tight_layout(w_pad=2)
            figure.savefig(path(scheme, directory), format="svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)


def check(directory: Path = RESULTS) -> None:
    """BenchmarkError where a chart does not show what the result says."""
    wanted = labels(rows(directory))
    for scheme in SCHEMES:
        chart = path(scheme, directory)
        text = chart.read_text("utf-8") if chart.exists() else ""
        for label in wanted:
            if f">{html.escape(label, quote=False)}<" not in text:
                raise BenchmarkError(
                    f"{chart.name}: expected {label!r} in it, as the results say: python -m benchmarks table --write"
                )
