"""Computing only, in memory: the released procedure, two faster forms of it in plain torch, and ours."""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .generate import DELTAS, Spec, generate
from .machine import usable_cores
from .process import ratio, spread
from .released import (
    PAPER,
    RELEASED,
    THIN,
    Clock,
    Procedure,
    kthvalue_prune,
    lowrank_svd,
    merge,
    relative_error,
    targets_by_shape,
    tune_lowrank,
)
from .results import Results

States = tuple[dict[str, Tensor], list[dict[str, Tensor]]]


def load(data: Path, spec: Spec, experts: int) -> States:
    paths = generate(data, spec, experts)
    return load_file(paths.files[0]), [load_file(path) for path in paths.files[1:]]


def time_procedure(states: States, procedure: Procedure, sample: int | None) -> dict[str, Any]:
    """Seconds for all matrices of all experts.

    With `sample`, that many matrices of each shape are timed, spread over experts and depth, and their time scaled by
    how many there are; the result says so ("measured" of "matrices").
    """
    base, experts = states
    chosen, weight = choose(base, len(experts), sample)
    merge(dict(list(base.items())[:8]), [experts[0]], procedure, **PAPER)  # threads and workspaces exist from here on
    clock = Clock()
    merge(base, experts, procedure, only=lambda number, name: (number, name) in chosen, clock=clock, **PAPER)
    shapes = {"x".join(map(str, shape)): seconds for shape, seconds in clock.shapes.items() if shape in weight}
    scaled = sum(seconds * weight.get(shape, 1.0) for shape, seconds in clock.shapes.items())
    total = sum(len(names) for names in targets_by_shape(base).values()) * len(experts)
    measured = sum(name in chosen_names(base) for _, name in chosen)
    print(f"  {scaled:.2f} s ({measured} of {total} matrices measured)", flush=True)
    return {
        "seconds": spread([scaled]), "measured": measured, "matrices": total,
        "phases": dict(clock.phases), "measured_seconds_by_shape": shapes,
    }  # fmt: skip


def chosen_names(base: Mapping[str, Tensor]) -> set[str]:
    return {name for names in targets_by_shape(base).values() for name in names}


def choose(
    base: Mapping[str, Tensor], experts: int, sample: int | None
) -> tuple[set[tuple[int, str]], dict[tuple[int, ...], float]]:
    """(expert, name) pairs to work on, and by which factor the time of each shape of matrix is to be scaled."""
    groups = targets_by_shape(base)
    matrices = chosen_names(base)
    chosen = {(number, name) for number in range(experts) for name in base if name not in matrices}
    weight: dict[tuple[int, ...], float] = {}
    for shape, names in groups.items():
        pairs = [(number, name) for number in range(experts) for name in names]
        picked = pairs if sample is None else pairs[:: max(1, math.ceil(len(pairs) / sample))]
        weight[shape] = len(pairs) / len(picked)
        chosen.update(picked)
    return chosen, weight


def sample_deltas(states: States, count: int) -> dict[tuple[int, ...], list[Tensor]]:
    """A few deltas of each shape of matrix, spread over depth."""
    base, experts = states
    deltas: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for shape, names in targets_by_shape(base).items():
        for index in range(count):
            name = names[index * (len(names) - 1) // max(1, count - 1)]
            deltas[shape].append(experts[index % len(experts)][name].float() - base[name].float())
    return deltas


def time_lowrank(states: States, sample: int | None, count: int) -> dict[str, Any]:
    """svd_lowrank with the cheapest setting, per shape, that gets L right to 1e-3 on `count` matrices of the shape."""
    tuned = {shape: tune_lowrank(deltas, PAPER["rank"]) for shape, deltas in sample_deltas(states, count).items()}
    decompose = {shape: lowrank_svd(trial["q"], trial["niter"]) for shape, trial in tuned.items()}
    procedure = Procedure(lambda delta, rank: decompose[tuple(delta.shape)](delta, rank), kthvalue_prune)
    timed = time_procedure(states, procedure, sample)
    return timed | {
        "error": max(trial["error"] for trial in tuned.values()),
        "met": all(trial["met"] for trial in tuned.values()),
        "tuned": {"x".join(map(str, shape)): trial for shape, trial in tuned.items()},
    }


def time_ours(states: States, repeats: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`lors.merge_state_dicts` on the cpu backend: seconds, and the merged weights."""
    import lors

    base, experts = states
    named = {f"expert{number}": expert for number, expert in enumerate(experts)}
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        merged: dict[str, Tensor] = lors.merge_state_dicts(base, named, method="lors", backend="cpu", **PAPER)
        seconds.append(time.perf_counter() - begin)
    print(f"  {spread(seconds[1:])['median']:.3f} s", flush=True)
    return {"seconds": spread(seconds[1:]), "repeats": repeats}, merged


def our_error(states: States, count: int) -> float:
    """The largest relative error of our L against a float64 SVD, on `count` matrices of each shape."""
    import lors_kernels

    errors = []
    for deltas in sample_deltas(states, count).values():
        for delta in deltas:
            found = lors_kernels.truncated_svd(torch.zeros_like(delta), delta, PAPER["rank"], backend="cpu")
            errors.append(relative_error(found.left @ found.right.T, delta, PAPER["rank"]))
    return max(errors)


def agreement(merged: Mapping[str, Tensor], other: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    """||merged - other|| / ||other - base|| over all weights."""
    apart = sum(float((merged[name] - other[name]).double().square().sum()) for name in base)
    moved = sum(float((other[name] - base[name]).double().square().sum()) for name in base)
    return math.sqrt(apart / moved)


def run(results: Results, data: Path, repeats: int, *, sample: int | None = None) -> None:
    """Ours against every rival, on each kind of deltas (the last is the hardest for us)."""
    torch.set_num_threads(usable_cores())
    size, experts = ("tiny", 2) if results.quick else ("small", 5)
    for deltas in DELTAS:
        prefix = f"{size} float32, {experts} experts, {deltas}"
        states = load(data, Spec(size, deltas=deltas), experts)
        run_states(results, prefix, states, repeats, sample)
        run_spectral(results, prefix, states, repeats)


def run_states(results: Results, prefix: str, states: States, repeats: int, sample: int | None) -> None:
    count = 2 if results.quick else 3
    mine = results.record(f"{prefix}: ours", partial(measure_ours, states, repeats, count))
    rivals: dict[str, Callable[[], dict[str, Any]]] = {
        "as released": partial(time_procedure, states, RELEASED, sample),
        "thin SVD, kthvalue": partial(time_procedure, states, THIN, sample),
        "svd_lowrank": partial(time_lowrank, states, sample, count),
    }
    for name, measure in rivals.items():
        other = results.record(f"{prefix}: {name}", measure)
        other["ratio"] = ratio(other["seconds"], mine["seconds"])
    results.save()


def run_spectral(results: Results, prefix: str, states: States, repeats: int) -> None:
    """Methods that need most of the spectrum, beside the thin SVD of every expert's delta, which they contain as published.

    One matrix of each shape is timed, ours and theirs in turn, and scaled by how many there are.
    """
    base, experts = states
    groups = targets_by_shape(base)
    seconds: dict[str, list[float]] = {"tsv": [], "iso_c": [], "thin SVDs": []}
    for round in range(repeats + 1):
        for what, taken in seconds.items():
            took = sum(len(names) * time_spectral(what, base, experts, names[0]) for names in groups.values())
            if round:  # the first pays for threads and workspaces
                taken.append(took)
    for method in ("tsv", "iso_c"):
        piece = {"seconds": spread(seconds[method]), "thin SVDs": spread(seconds["thin SVDs"])}
        piece["ratio"] = ratio(piece["thin SVDs"], piece["seconds"])
        results.pieces[f"{prefix}, {method}: beside the experts' thin SVDs"] = piece
        print(
            f"  {method}: {piece['seconds']['median']:.1f} s, thin SVDs {piece['thin SVDs']['median']:.1f} s",
            flush=True,
        )
    results.save()


def time_spectral(what: str, base: Mapping[str, Tensor], experts: list[dict[str, Tensor]], name: str) -> float:
    """Seconds for one matrix; of one thread, which is what a worker of the engine has."""
    import lors

    one = {name: base[name]}
    named = {f"expert{number}": {name: expert[name]} for number, expert in enumerate(experts)}
    deltas = [expert[name].float() - base[name].float() for expert in experts]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    begin = time.process_time()
    if what == "thin SVDs":
        for delta in deltas:
            torch.linalg.svd(delta, full_matrices=False)
    else:
        lors.merge_state_dicts(one, named, method=what, backend="cpu", target={"include": [re.escape(name)]}, threads=1)
    took = time.process_time() - begin
    torch.set_num_threads(before)
    return took


def measure_ours(states: States, repeats: int, count: int) -> dict[str, Any]:
    timed, merged = time_ours(states, repeats)
    picked = pick_first(states[0])
    few = merge(*states, THIN, only=picked, **PAPER)
    subset = {name: tensor for name, tensor in states[0].items() if picked(0, name)}
    return timed | {"error": our_error(states, count), "agreement": agreement(merged, few, subset)}


def pick_first(base: Mapping[str, Tensor]) -> Callable[[int, str], bool]:
    """Two matrices of each shape, and everything that is not a matrix: enough to see that two merges agree."""
    groups = targets_by_shape(base)
    picked = {name for names in groups.values() for name in names[:2]}
    return lambda number, name: name in picked or all(name not in names for names in groups.values())
