"""How the whole command's time and memory grow with experts, rank, density and model size; a plot of the four."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lors.pages import charts, colours

from .bench_merge import Scene, lors_case, lors_command
from .errors import BenchmarkError
from .generate import Spec, generate
from .process import Case, interleave, measure
from .results import Results

AXES = {
    "experts": "experts",
    "rank": "rank",
    "density": "density (kept fraction)",
    "size": "GB read and written",
}


def points(axis: str, quick: bool) -> list[Any]:
    full: dict[str, list[Any]] = {
        "experts": list(range(1, 11)),
        "rank": [1, 2, 4, 7, 16, 32, 64],
        "density": [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5],
        "size": ["tiny", "base", "small", "turbo", "medium", "large-v3"],
    }
    return full[axis][:2] if quick else full[axis]


def scene_for(axis: str, point: Any, data: Path, small: str) -> tuple[Scene, dict[str, Any]]:
    """The inputs of one point (5 experts, but 3 in half precision along the sizes), and the options that it changes."""
    spec, experts = (Spec(point, "float16"), 3) if axis == "size" else (Spec(small), point if axis == "experts" else 5)
    scene = Scene(generate(data, spec, experts), spec, data / "out" / f"scaling-{axis}-{point}")
    return scene, {axis: point} if axis in ("rank", "density") else {}


def measure_axis(axis: str, data: Path, repeats: int, quick: bool) -> dict[str, Any]:
    """{"points": [...], "x": [...], "runs": [summary of each point]}, points interleaved where memory allows."""
    found: dict[str, Any] = {"axis": AXES[axis], "points": [], "x": [], "runs": []}
    scenes = {point: scene_for(axis, point, data, "tiny" if quick else "small") for point in points(axis, quick)}
    # The points of one axis share their files, except along the sizes: those are too many for the page cache at once.
    groups: Sequence[list[Any]] = [[point] for point in scenes] if axis == "size" else [list(scenes)]
    try:
        for scene, _ in scenes.values():
            shutil.rmtree(scene.out, ignore_errors=True)  # an earlier run that was killed
        for group in groups:
            cases = [lors_point(*scenes[point], name=str(point), repeats=repeats) for point in group]
            for case in cases:
                measure(case.command, env=case.env)  # remembers the digests
            files = max((scenes[point][0].inputs.files for point in group), key=len)
            measured = interleave(cases, files, lambda line: print(f"  {axis} {line}", flush=True))
            for point in group:
                if "failed" in measured[str(point)]:
                    raise BenchmarkError(f"{axis} {point}: {measured[str(point)]['failed']}")
                inputs = scenes[point][0].inputs.files
                moved = sum(path.stat().st_size for path in (*inputs, inputs[0]))
                found["points"].append(point)
                found["x"].append(moved / 1e9 if axis == "size" else point)
                found["runs"].append(measured[str(point)])
    finally:
        for scene, _ in scenes.values():
            shutil.rmtree(scene.out, ignore_errors=True)
    return found


def lors_point(scene: Scene, options: dict[str, Any], *, name: str, repeats: int) -> Case:
    env = lors_case(scene, "lors", "lors", repeats, digests=True).env
    out = scene.output("lors")
    return Case(
        name, lors_command(scene, out, **options), repeats, env, prepare=lambda: shutil.rmtree(out, ignore_errors=True)
    )


def run(results: Results, data: Path, repeats: int) -> None:
    for axis in AXES:
        results.record(axis, partial(measure_axis, axis, data, repeats, results.quick))
    plot(results.data, results.path.with_suffix(".png"))
    print(f"plot: {results.path.with_suffix('.png').name}", flush=True)


def plot(data: dict[str, Any], path: Path) -> None:
    """A panel per axis: seconds (line, band from the least to the greatest repeat) and peak memory (dashed)."""
    import matplotlib
    from matplotlib.figure import Figure

    pieces = {axis: piece for axis, piece in data["results"].items() if "failed" not in piece}
    time, memory = colours.LIGHT["c0"], colours.LIGHT["c1"]
    with matplotlib.rc_context(charts.look(11)):  # text has the size of the text around it where a README shows it
        figure = Figure(figsize=(8.3, 6.4), layout="constrained")
        panels = figure.subplots(2, 2).flat
        for panel, piece in zip(panels, pieces.values(), strict=False):
            order = sorted(range(len(piece["x"])), key=lambda index: piece["x"][index])
            x = [piece["x"][index] for index in order]
            runs = [piece["runs"][index] for index in order]
            low, middle, high = ([run["wall_s"][key] for run in runs] for key in ("min", "median", "max"))
            panel.fill_between(x, low, high, alpha=0.25, color=time, linewidth=0)
            panel.plot(x, middle, "o-", color=time, markersize=4, label="seconds (left), least to greatest")
            panel.set(xlabel=piece["axis"], ylim=(0, 1.12 * max(high)))
            panel.set_ylabel("s", rotation=0, labelpad=8)
            beside = panel.twinx()
            peaks = [run["peak_rss"]["median"] / 1e9 for run in runs]
            beside.plot(x, peaks, "s--", color=memory, markersize=4, label="peak memory, GB (right)")
            beside.set(ylim=(0, 1.12 * max(peaks)))
            beside.set_ylabel("GB", rotation=0, labelpad=14)
            beside.spines["right"].set_visible(True)
            beside.grid(visible=False)
            _spread(panel, x, [piece["points"][index] for index in order], middle)
        handles = [line for axes in figure.axes[:1] + figure.axes[-1:] for line in axes.get_legend_handles_labels()[0]]
        figure.legend(handles=handles[:: max(1, len(handles) - 1)], loc="outside upper center", ncols=2)
        figure.savefig(path, dpi=200, metadata={"Software": None})


def _spread(panel: Any, x: list[float], names: list[Any], middle: list[float]) -> None:
    """What grows by factors lies on a logarithmic axis; points that are models bear their names."""
    if max(x) > 20 * min(x):
        panel.set_xscale("log")
        apart = [value for place, value in enumerate(x) if place == 0 or value > 1.6 * x[place - 1]]
        panel.set_xticks(apart if names == x else [tick for tick in (0.5, 1, 2, 5, 10, 20) if tick <= max(x)])
        panel.xaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
    for place, name in enumerate(names if names != x else ()):
        crowded = place > 0 and x[place] < 1.3 * x[place - 1]  # below what stands above its neighbour
        panel.annotate(
            name, (x[place], middle[place]), (6, -14) if crowded else (-3, 8), fontsize=9.5, textcoords="offset points",
            ha="left" if crowded else "right" if place else "center",
        )  # fmt: skip
