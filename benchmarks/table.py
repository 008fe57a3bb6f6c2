"""Measured tables rendered from committed results, no number typed by hand: all of them in docs/measurements.md, the
main ones in the README."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import BenchmarkError
from .machine import ROOT
from .results import RESULTS, newest
from .run_operation import OPERATIONS

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
README, DETAILS = ROOT / "README.md", ROOT / "docs" / "measurements.md"

Result = dict[str, Any]


def render(directory: Path = RESULTS) -> str:
    """Markdown of every part that has a result, in reading order."""
    sections = [
        (merge_table, "merge"),
        (compute_table, "compute"),
        (decompositions_table, "truncated_svd"),
        (scaling_table, "scaling"),
        (integrations_table, "integrations"),
        (experts_table, "experts"),
        (speech_table, "speech"),
    ]
    blocks = [draw(found, directory) for draw, part in sections if (found := newest(part, directory))]
    operations = {name: found for name in OPERATIONS if name != "truncated_svd" and (found := newest(name, directory))}
    if operations:
        blocks.append(operations_table(operations))
    if not blocks:
        raise BenchmarkError(f"{directory.name}: expected results, got none (run `python -m benchmarks all`)")
    return "\n\n".join(blocks)


def summary(directory: Path = RESULTS) -> str:
    """The whole commands of `merge` without their floors, and where the numbers are from."""
    found = newest("merge", directory)
    if found is None:
        raise BenchmarkError(f"{directory.name}: expected a result of `merge`, got none")
    rows = ["| files to files | time | beside `lors merge` | peak memory |", "|---|---:|---:|---:|"]
    for title, piece in found["results"].items():
        if "failed" not in piece and "flat" not in title and not title.startswith("micro"):
            shown = {n: run for n, run in piece["commands"].items() if not n.startswith("floor") and "first" not in n}
            rows += [f"| {title}: {name} | {cells} |" for name, cells in command_cells(shown)]
    return "\n".join([*rows, "", provenance(found, "python -m benchmarks merge")])


def provenance(result: Result, command: str, numbers: str = "Median (least to greatest)") -> str:
    machine = result["machine"]
    commit = (machine["commit"] or "unknown")[:10] + (" with local changes" if machine["dirty"] else "")
    return (
        f"<sub>`{command}` on {machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, "
        f"Python {machine['python']}, torch {machine['versions']['torch']}; commit {commit}, {machine['date'][:10]}. "
        f"{numbers}.</sub>"
    )


def command_cells(commands: dict[str, Result]) -> Iterator[tuple[str, str]]:
    """(name, "time | beside `lors merge` | peak memory") of whole commands."""
    mine = commands["lors"]
    for name, run in commands.items():
        if "failed" in run:
            yield name, "failed | |"
            continue
        times = run["wall_s"]["median"] / mine["wall_s"]["median"] if "failed" not in mine else float("nan")
        yield name, f"{seconds(run['wall_s'])} | {times:.2g}x | {gigabytes(run)}"


def merge_table(result: Result, directory: Path) -> str:
    rows = ["## Whole command, files to files", ""]
    for title, piece in result["results"].items():
        if "failed" in piece:
            rows += [f"{title}: not measured ({piece['failed']})", ""]
            continue
        rows += [f"| {title} | time | beside `lors merge` | peak memory | processor |", "|---|---:|---:|---:|---:|"]
        for name, cells in command_cells(piece["commands"]):
            run = piece["commands"][name]
            used = f"{sum(run[part]['median'] for part in ('user_s', 'system_s')):.3g} s" if "failed" not in run else ""
            rows.append(f"| {name} | {cells} | {used} |")
        if (wudi := piece.get("wudi")) is not None:
            rows += [
                "",
                f"`wudi`: {wudi['cpu_s']['median']:.3g} s of the processor; four times task arithmetic's and its products at 70 % "
                f"of one core's measured peak are {wudi['goal_s']:.3g} s.",
            ]
        rows.append("")
    return "\n".join([*rows, provenance(result, "python -m benchmarks merge")])


def compute_table(result: Result, directory: Path) -> str:
    rows = ["## Computing only, in memory", "", "| | time | beside ours | error of L |", "|---|---:|---:|---:|"]
    for title, piece in result["results"].items():
        if "failed" in piece:
            rows.append(f"| {title} | failed | | |")
            continue
        times = f"{piece['ratio']['median']:.3g}x" if "ratio" in piece else "1x"
        scaled = " (scaled from a sample)" if piece.get("measured") != piece.get("matrices") else ""
        missed = " (1e-3 not reached)" if not piece.get("met", True) else ""
        error = f"{piece['error']:.0e}{missed}" if "error" in piece else ""
        rows.append(f"| {title} | {seconds(piece['seconds'])}{scaled} | {times} | {error} |")
    return "\n".join([*rows, "", provenance(result, "python -m benchmarks compute")])


def scaling_table(result: Result, directory: Path) -> str:
    rows = [
        "## How the cost grows (whole command)",
        "",
        "| | from | to | time | peak memory |",
        "|---|---|---|---:|---:|",
    ]
    for axis, piece in result["results"].items():
        if "failed" in piece:
            continue
        first, last = piece["runs"][0], piece["runs"][-1]
        times = " to ".join(f"{run['wall_s']['median']:.2f}" for run in (first, last))
        memory = " to ".join(f"{run['peak_rss']['median'] / 1e9:.2f}" for run in (first, last))
        rows.append(f"| {axis} | {piece['points'][0]} | {piece['points'][-1]} | {times} s | {memory} GB |")
    plots = sorted(directory.glob("scaling-*.png"))
    name = f"scaling-{result['label'] or result['machine']['date'][:10]}.png"
    picture = (
        [f"![time and memory](../{(directory / name).relative_to(ROOT)})", ""] if directory / name in plots else []
    )
    return "\n".join([*rows, "", *picture, provenance(result, "python -m benchmarks scaling")])


def integrations_table(result: Result, directory: Path) -> str:
    rows = ["## Under mergekit", ""]
    for title, piece in result["results"].items():
        if "failed" in piece:
            rows += [f"{title}: not measured ({piece['failed']})", ""]
            continue
        rows += [f"| {title} | time | peak memory | relative difference of the results |", "|---|---:|---:|---:|"]
        apart = {name.partition(" against ")[0]: found["relative"] for name, found in piece["agreement"].items()}
        for name, run in piece["commands"].items():
            difference = f"{apart[name]:.1e}" if name in apart else ""
            rows.append(f"| {name} | {seconds(run['wall_s'])} | {gigabytes(run)} | {difference} |")
        rows += ["", ratios(piece), ""]
    return "\n".join([*rows, provenance(result, "python -m benchmarks integrations")])


def speech_table(result: Result, directory: Path) -> str:
    rows = ["## Speech, one thread", "", "| | |", "|---|---:|"]
    for piece in result["results"].values():
        rows += [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in piece.items() if name != "failed"]
    return "\n".join([*rows, "", provenance(result, "python -m benchmarks speech", "Of a step's times the least")])


def experts_table(result: Result, directory: Path) -> str:
    pieces = {name: piece for name, piece in result["results"].items() if "failed" not in piece}
    rows = ["## Expert files and sweeps", ""]
    if "options" in pieces:
        words = pieces.get("words", {}).get("options", {})
        rows += [
            "| values, places, remainder | MB | of the checkpoint | error of the merged update | WER | answers changed |"
        ]
        rows += ["|---|---:|---:|---:|---:|---:|"]
        for name, option in [*({"checkpoints": None} if words else {}).items(), *pieces["options"].items()]:
            stored = (
                f"{option['bytes'] / 1e6:.0f} | {100 * option['share']:.1f} % | {option['error']:.1e}"
                if option
                else "| |"
            )
            spoken = words.get(name)
            said = f"{spoken['wer']:.2f} % | {spoken['differing']} of {spoken['answers']}" if spoken else "|"
            rows.append(f"| {name} | {stored} | {said} |")
        rows += ["", "WER: the speech harness's tiny base and the experts of its experiment `quick`, on test.", ""]
    for title in ("commands", "sweeps"):
        if title in pieces:
            rows += [f"| {title} | time | peak memory |", "|---|---:|---:|"]
            rows += [
                f"| {name} | {seconds(run['wall_s'])} | {gigabytes(run)} |" if "failed" not in run else f"| {name} | failed | |"
                for name, run in pieces[title]["commands"].items()
            ]  # fmt: skip
            rows += ["", ratios(pieces[title]), ""]
    return "\n".join([*rows, provenance(result, "python -m benchmarks experts")])


def operations_table(operations: dict[str, Result]) -> str:
    """Float32, cold cache, power-law deltas; the fastest plain torch form beside ours."""
    rows = ["## Kernel operations, float32, cold cache", ""]
    rows += ["| | shape | ms | GB/s | of the floor | plain torch, ms | faster |", "|---|---|---:|---:|---:|---:|---:|"]
    for operation, result in operations.items():
        pieces = result["results"]
        for name, piece in pieces.items():
            stem, impl = name.rsplit(", ", 1)
            if impl != "cpu" or not shown(name):
                continue
            rivals = [other for key, other in pieces.items() if key.startswith(stem) and key != name]
            best = min((rival["ms"]["median"] for rival in rivals), default=None)
            mine = piece["ms"]["median"]
            against = f"{best:.3g} | {best / mine:.1f}x" if best else "|"
            shape = "x".join(map(str, piece["shape"]))
            rows.append(
                f"| `{operation}` | {shape} | {mine:.3g} | {piece['GB/s']:.1f} | "
                f"{floor_share(result, piece, result['machine']['cores'])} | {against} |"
            )
    note = provenance(next(iter(operations.values())), "python -m benchmarks gram_apply (and so on)")
    return "\n".join([*rows, "", FLOOR, "", note])


FLOOR = (
    "Of the floor: the time in which the same run's measured bandwidth would read and write the counted bytes, or its measured "
    "peak do the multiply-adds, whichever is longer, over the time it took."
)


def shown(name: str) -> bool:
    hidden = ("warm", "flat", "buried", "rank ")
    return ", float32" in name and not name.startswith("tiny") and not any(f", {what}" in name for what in hidden)


def floor_share(result: Result, piece: Result, threads: int) -> str:
    """What is read comes from memory; "" in results that measured no peaks."""
    if "peaks" not in result:
        return ""
    peaks = result["peaks"][str(threads)]
    reading = piece["bytes"] / list(peaks["read"].values())[-1]
    floor = max(reading, piece.get("flops", 0) / peaks["multiply"])
    return f"{1e5 * floor / piece['ms']['median']:.0f} %"


def decompositions_table(result: Result, directory: Path) -> str:
    """One decomposition on one thread: ours, the solvers of scipy that are as right, the thin SVD."""
    pieces = result["results"]
    rows = ["## One decomposition of rank 7, float32, one thread", ""]
    rows += [
        "| shape | deltas | ms | passes | of the floor | error | ARPACK | PROPACK | better of the two | thin SVD | AVX2, ms |"
    ]
    rows += ["|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for name, mine in pieces.items():
        shape, dtype, deltas, *rest = name.split(", ")
        if dtype != "float32" or rest != ["cpu"] or shape.startswith("tiny"):
            continue
        took = mine["ms"]["median"]
        rivals = [pieces.get(f"{shape}, float32, {deltas}, scipy {solver}") for solver in ("ARPACK", "PROPACK")]
        cells = [f"{rival['ms']['median']:.3g} ({rival['error']:.0e})" if rival else "not right" for rival in rivals]
        best = min((rival["ms"]["median"] for rival in rivals if rival), default=None)
        thin = pieces[f"{shape}, float32, powerlaw, torch thin SVD"]["ms"]["median"]
        share = 1e5 * passes_floor(mine, result["peaks"]["1"]) / took
        older = pieces.get(f"{name} avx2")
        rows.append(
            f"| {'x'.join(map(str, mine['shape']))} | {deltas} | {took:.3g} | {mine['passes']} | {share:.0f} % | {mine['error']:.0e} | "
            f"{' | '.join(cells)} | {f'{best / took:.2g}x' if best else ''} | {thin / took:.0f}x | "
            f"{format(older['ms']['median'], '.3g') if older else ''} |"
        )
    rows += [
        "",
        "| rank of 768x768 | deltas | ms | method | thin SVD, ms | of its time |",
        "|---:|---|---:|---|---:|---:|",
    ]
    for name, mine in pieces.items():
        if "rank " in name and name.endswith(", cpu"):
            _, _, deltas, rank, _ = name.split(", ")
            took = mine["ms"]["median"]
            thin = pieces[name.removesuffix("cpu") + "torch thin SVD"]["ms"]["median"]
            rows.append(
                f"| {rank.removeprefix('rank ')} | {deltas} | {took:.3g} | {mine['method']} | {thin:.3g} | {took / thin:.2g}x |"
            )
    return "\n".join([*rows, "", PASSES_FLOOR, "", provenance(result, "python -m benchmarks truncated-svd")])


PASSES_FLOOR = (
    "Of the floor: the time in which the passes would read delta from the level of memory that holds it, at the rate at which one "
    "core was seen to read from there in the same run, or do their multiply-adds at its peak, whichever is longer, over the time it "
    "took. Prefetching reads faster than that rate."
)


def passes_floor(piece: Result, peaks: Result) -> float:
    """Seconds."""
    size = 4 * math.prod(piece["shape"])
    rate = next(rate for level, rate in peaks["read"].items() if size <= int(level))
    return max(piece["passes"] * size / rate, piece["flops"] / peaks["multiply"])


def seconds(spread: dict[str, float]) -> str:
    if spread["min"] == spread["max"]:
        return f"{spread['median']:.3g} s"
    return f"{spread['median']:.3g} s ({spread['min']:.3g} to {spread['max']:.3g})"


def gigabytes(run: Result) -> str:
    return f"{run['peak_rss']['median'] / 1e9:.2f} GB"


def ratios(piece: Result) -> str:
    return "; ".join(f"{name}: {value['median']:.2g}x" for name, value in piece["ratios"].items())


def block(page: Path) -> tuple[str, str, str]:
    """A page before, between and after the markers."""
    text = page.read_text()
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise BenchmarkError(f"{page.name}: expected one {START} followed by one {END}")
    before, rest = text.split(START)
    middle, after = rest.split(END)
    return before, middle, after


def update(readme: Path = README, details: Path = DETAILS, directory: Path = RESULTS) -> None:
    for page, draw in ((readme, summary), (details, render)):
        before, _, after = block(page)
        page.write_text(f"{before}{START}\n{draw(directory)}\n{END}{after}")


def check(readme: Path = README, details: Path = DETAILS, directory: Path = RESULTS) -> None:
    """Raise BenchmarkError when a page's block is not what the results say."""
    for page, draw in ((readme, summary), (details, render)):
        _, found, _ = block(page)
        expected = f"\n{draw(directory)}\n"
        if found != expected:
            changed = list(difflib.unified_diff(found.splitlines(), expected.splitlines(), lineterm="", n=0))
            line = next((line for line in changed[2:] if line[0] in "+-"), "")
            raise BenchmarkError(
                f"{page.name}: expected the tables of `python -m benchmarks table`, got a difference: {line}"
            )
