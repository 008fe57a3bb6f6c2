"""`--check` compares a merge with its definition: right ones pass, and faults of every part of the engine are seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lors
import lors_kernels
import tiny
from calibrated import statistics
from lors import LorsError
from lors.checkpoints import layers
from lors.engine import cpu, work
from lors.engine.work import Piece
from lors.experts.decompose import decompose
from lors.merging import job, verify
from lors.methods import (
    METHODS,
    Reduction,
    della_linear,
    iso_c,
    iso_cts,
    lors_parts,
    model_stock,
    operands,
    regmean,
    slerp,
    sparsified,
    tsv,
    wudi,
)
from lors_kernels import dense
from lors_kernels.backends import cpu as kernels

WEIGHTS = {"ca": 1.0, "de": 0.5, "es": -0.7}
SETTINGS: dict[str, Any] = {
    **{"density": 0.3, "rank": 3, "weight": WEIGHTS, "lambda": 0.7, "gamma": 0.05, "epsilon": 0.1},
    **{"rescale": True, "normalize": True, "filter_wise": True, "t": 0.4},
}
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.family(tmp_path_factory.mktemp("family"), dtype=request.param)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """float32: the deltas of the other family are a unit or two of bfloat16, which hides what is 1 % wrong."""
    return tiny.family(tmp_path_factory.mktemp("exact"))


def check(family: dict[str, Path], out: Path, method: str, **more: Any) -> str:
    """The line of a checked merge with the settings that the method knows."""
    known = {parameter.name for parameter in METHODS[method].spec.parameters}
    if "statistics" in known:
        more = {"statistics": statistics(family["base"].parent, tuple(WEIGHTS), tiny.shapes())} | more
    settings = {"lam" if k == "lambda" else k: v for k, v in SETTINGS.items() if k in known}
    experts = {name: family[name] for name in (["ca"] if method == "slerp" else WEIGHTS)}
    report = lors.merge(family["base"], experts, out, method, durable=False, check=True, **{**settings, **more})
    return next(notice for notice in report.notices if notice.startswith("checked"))


@pytest.mark.parametrize("method", METHODS)
def test_merges_are_their_definition(method: str, family: dict[str, Path], tmp_path: Path) -> None:
    said = check(family, tmp_path / "out", method)
    assert (
        f"{len(tiny.shapes())} tensors reloaded, {len(tiny.shapes())} of them compared with the method's definition"
        in said
    )
    if METHODS[method].targets:
        check(family, tmp_path / "some", method, target={"select": "attention"}, rest="average", out_dtype="float16")
    if METHODS[method].relative and METHODS[method].spec.parameter("lambda"):
        gradient = {"filter": "encoder", "value": [0.1, 0.9]}, {"value": 0.5}
        check(family, tmp_path / "depth", method, lam=list(gradient), rest="base", target={"select": "mlp"})
        for rest in ("task_arithmetic", "average"):
            check(family, tmp_path / rest, method, rest=rest, rest_lambda=list(gradient))


@pytest.mark.parametrize("method", ["lors", "task_arithmetic", "ties", "tsv", "della"])
@pytest.mark.parametrize("options", [{"density": 1.0}, {"density": 0.5, "values": "bfloat16"}, {"density": 0.0}])
def test_merges_from_expert_files(
    method: str, options: dict[str, Any], family: dict[str, Path], tmp_path: Path
) -> None:
    files = {"base": family["base"]}
    for name in WEIGHTS:
        files[name] = tmp_path / f"{name}.lors.safetensors"
        decompose(family["base"], family[name], files[name], name=name, **options)
    settings = {"density": min(0.3, options["density"])} if method == "lors" else {}
    check(files, tmp_path / "out", method, **settings)
    if method == "lors":
        check(files, tmp_path / "low", method, rank=2, density=0.2 if options["density"] else 0.0)


def wrong(function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **options: change(function(*args, **options))


def an_expert_is_left_out(patch: Patch) -> None:
    terms = cpu.Engine.terms
    patch.setattr(cpu.Engine, "terms", lambda *args: (t := terms(*args))._replace(experts=t.experts[:-1]))


def lambda_counts_twice(patch: Patch) -> None:
    lors_method = METHODS["lors"]
    twice = wrong(lors_method.reduce, lambda found: [r._replace(weight=0.7 * r.weight) for r in found])
    patch.setitem(METHODS, "lors", replace(lors_method, reduce=twice))


def the_rest_has_no_lambda(patch: Patch) -> None:
    patch.setattr(job, "rest_of", lambda rule, models, shared: [Reduction(model["weight"]) for model in models])


def the_rest_has_the_lambda_of_the_matrices(patch: Patch) -> None:
    rest_of = job.rest_of
    patch.setattr(job, "rest_of", lambda rule, models, shared: rest_of(rule, models, {**shared, "rest_lambda": None}))


def nothing_is_decomposed(patch: Patch) -> None:
    plan = job.plan
    patch.setattr(job, "plan", lambda specs, matrices, *more: plan(specs, set(), *more))


def a_slab_is_carried_over(patch: Patch) -> None:
    patch.setattr(work, "SLAB", 512)
    merge = cpu.Engine._merge

    def some(self: cpu.Engine, piece: Piece, worker: Any) -> Any:
        if piece.start != 512:
            return merge(self, piece, worker)
        base = self.base.fetch(piece.work.name, piece.start, piece.stop, worker.base)
        self._write(piece, worker, base, None)
        return []

    patch.setattr(cpu.Engine, "_merge", some)


def a_triplet_is_missing(patch: Patch) -> None:
    svd = kernels.truncated_svd
    patch.setattr(kernels, "truncated_svd", lambda base, tuned, rank, **more: svd(base, tuned, rank - 1, **more))


def too_few_are_kept(patch: Patch) -> None:
    threshold = kernels.residual_threshold
    patch.setattr(
        kernels,
        "residual_threshold",
        lambda *args, **more: threshold(*args[:4], int(0.95 * args[4]), **more),
    )


def the_kept_energy_is_wrong(patch: Patch) -> None:
    update = wrong(kernels.merge_update, lambda found: [s._replace(kept_energy=1.01 * s.kept_energy) for s in found])
    patch.setattr(kernels, "merge_update", update)


def the_low_energy_is_wrong(patch: Patch) -> None:
    update = wrong(
        kernels.merge_update, lambda found: [s._replace(residual_energy=0.99 * s.residual_energy) for s in found]
    )
    patch.setattr(kernels, "merge_update", update)


def nothing_is_trimmed(patch: Patch) -> None:
    patch.setattr(operands.Operands, "threshold", lambda self, t, k: lors_kernels.KEEP_ALL)


def no_election(patch: Patch) -> None:
    made = sparsified.sparsified("ties", sparsified.largest, elect=False, normalize=True, rescale=False)
    patch.setitem(METHODS, "ties", replace(METHODS["ties"], combine=made.combine))


def no_rescaling(patch: Patch) -> None:
    patch.setattr(sparsified, "rescaled", lambda operands, t, keep: keep)


def other_random_numbers(patch: Patch) -> None:
    patch.setattr(sparsified, "random_key", lambda seed, expert, tensor: lors_kernels.random_key(seed, tensor, expert))


def ranks_from_the_other_end(patch: Patch) -> None:
    ranks = della_linear._ranks
    patch.setattr(della_linear, "_ranks", wrong(ranks, lambda found: found.max() - found))


def dropped_entries_are_not_counted(patch: Patch) -> None:
    patch.setattr(operands.Operands, "count_dropped", lambda self, energy: None)


def no_sparse_part(patch: Patch) -> None:
    patch.setattr(lors_parts, "add_kept", lambda *_: None)


def scaled(module: Any, name: str) -> Callable[[Patch], None]:
    def change(found: Any) -> Any:
        return tuple(1.01 * x for x in found) if isinstance(found, tuple) else 1.01 * found

    return lambda patch: patch.setattr(module, name, wrong(getattr(module, name), change))


FAULTS: list[tuple[str, Callable[[Patch], None]]] = [
    *((method, an_expert_is_left_out) for method in ("lors", "task_arithmetic", "linear", "svp", "magnitude_prune")),
    *((method, nothing_is_decomposed) for method in ("lors", "tsv")),
    *((method, the_rest_has_no_lambda) for method in ("lors", "svp")),
    *(("lors", lambda_counts_twice), ("lors", a_triplet_is_missing), ("lors", too_few_are_kept)),
    *(
        ("lors", the_kept_energy_is_wrong),
        ("lors", the_low_energy_is_wrong),
        ("task_arithmetic", a_slab_is_carried_over),
    ),
    *((method, nothing_is_trimmed) for method in ("ties", "breadcrumbs", "breadcrumbs_ties")),
    *(("ties", no_election), ("ties", no_rescaling), ("dare_linear", no_rescaling), ("breadcrumbs", no_rescaling)),
    *(("dare_linear", other_random_numbers), ("dare_ties", other_random_numbers)),
    *((method, ranks_from_the_other_end) for method in ("della", "della_linear")),
    *((method, dropped_entries_are_not_counted) for method in ("della", "della_linear")),
    *((method, scaled(tsv, "polar_and_values")) for method in ("tsv", "lors_parts")),
    ("lors_parts", no_sparse_part),
    *((method.METHOD.spec.name, scaled(method, "polar")) for method in (iso_c, iso_cts)),
    *(("wudi", scaled(wudi, "ridge_quotient")), ("regmean", scaled(regmean, "ridge_quotient"))),
    *(("model_stock", scaled(model_stock, "interpolation")), ("slerp", scaled(slerp, "factors"))),
]


@pytest.mark.parametrize("method,fault", FAULTS)
def test_faults_are_seen(
    method: str, fault: Callable[[Patch], None], exact: dict[str, Path], tmp_path: Path, monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    with pytest.raises(LorsError, match="check: "):
        check(exact, tmp_path / "out", method)


@pytest.mark.parametrize("method", ["lors", "task_arithmetic", "ties", "wudi"])
@pytest.mark.parametrize("boost", ["boost", "boost_merged"])
def test_boosting_a_little_more_is_seen(
    boost: str, method: str, exact: dict[str, Path], tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(dense, "boosted", wrong(dense.boosted, lambda sigma: sigma * 1.01))
    with pytest.raises(LorsError, match="check: "):
        check(exact, tmp_path / "out", method, **{boost: 0.5})


@pytest.mark.parametrize("method", ["lors", "task_arithmetic", "ties", "dare_linear", "tsv"])
def test_a_wrong_lambda_of_the_rest_is_seen(
    method: str, exact: dict[str, Path], tmp_path: Path, monkeypatch: Patch
) -> None:
    the_rest_has_the_lambda_of_the_matrices(monkeypatch)
    with pytest.raises(LorsError, match="check: "):
        check(exact, tmp_path / "out", method, rest_lambda=0.3)


def test_a_large_model_is_sampled(exact: dict[str, Path], tmp_path: Path, monkeypatch: Patch) -> None:
    """One tensor of every kind at least."""
    monkeypatch.setattr(verify, "SAMPLE", 0)
    kinds = {layers.kind(name) for name in tiny.shapes()}
    assert f", {len(kinds)} of them compared with" in check(exact, tmp_path / "out", "lors")


BOOSTS: list[dict[str, Any]] = [{"boost": {"ca": 0.7, "es": 0.6}}, {"boost_merged": 0.6}]
BOOSTS.append({"boost": 0.7, "boost_merged": 0.4, "rest": "average", "target": {"select": "mlp"}})


@pytest.mark.parametrize("boost", BOOSTS, ids=str)
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].targets])
def test_boosted_merges_are_their_definition(
    method: str, boost: dict[str, Any], exact: dict[str, Path], tmp_path: Path
) -> None:
    check(exact, tmp_path / "out", method, **boost)
