"""Variations of LoRS against what they must equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lors.speech.experiment.merged import Merger, with_rest
from lors.speech.experiment.variants import weights
from lors.speech.model.whisper import load_model, load_processor

SETTING = {"rank": 4, "density": 0.2, "rest": "task_arithmetic"}


@pytest.fixture(scope="module")
def merger() -> Merger:
    """The base, and three experts that differ from it by a low rank and noise."""
    network = load_model("tiny")
    base = {name: value.clone() for name, value in network.state_dict().items() if name != "proj_out.weight"}
    generator = torch.Generator().manual_seed(0)

    def moved(value: torch.Tensor) -> torch.Tensor:
        noise = 0.01 * torch.randn(value.shape, generator=generator)
        if value.ndim == 2:
            left, right = (torch.randn(size, 3, generator=generator) for size in value.shape)
            noise += 0.02 * left @ right.T
        return value + noise

    experts = {f"expert-{i}": {name: moved(value) for name, value in base.items()} for i in range(3)}
    return Merger(base, experts, network, load_processor("tiny"))


def _merged(merger: Merger, method: str, **setting: Any) -> dict[str, torch.Tensor]:
    return _held(merger, method, {**SETTING, **setting})


def _held(merger: Merger, method: str, setting: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The network's own weights after a merge."""
    state = merger.holding(weights(merger, method, setting)).state_dict()
    return {name: value.clone() for name, value in state.items()}


def _apart(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def test_equal_factors_are_lors(merger: Merger) -> None:
    plain = _merged(merger, "lors", lam=0.4)
    assert _apart(plain, _merged(merger, "lors_scaled", low=0.4, sparse=0.4)) < 1e-6
    assert _apart(plain, _merged(merger, "lors_scaled", low=0.4, sparse=0.8)) > 1e-3


@pytest.mark.parametrize("method", ["lors_scaled", "lors_elect", "lors_energy", "lors_orthogonal"])
def test_what_is_not_decomposed_has_a_factor_of_its_own(merger: Merger, method: str) -> None:
    own = {
        "lors_scaled": {"rank": 4, "low": 0.4, "sparse": 0.3},
        "lors_elect": {"rank": 4, "lam": 0.4},
        "lors_energy": {"energy": 0.9, "lam": 0.4},
        "lors_orthogonal": {"low": 0.4, "sparse": 0.3},
    }[method]
    merged = _held(merger, method, {**own, "density": 0.2, "rest": "average", "rest_lambda": 0.7})
    other = _held(merger, method, {**own, "density": 0.2, "rest": "average", "rest_lambda": 1.4})
    for name, base in merger.base.items():
        if name in merger.matrices():
            assert torch.equal(merged[name], other[name])
            continue
        mean = sum(expert[name] - base for expert in merger.experts.values()) / 3
        torch.testing.assert_close(merged[name] - base, 0.7 * mean, atol=1e-6, rtol=1e-5)


def test_a_method_that_treats_all_tensors_has_no_rest_without_a_factor() -> None:
    """As before there was one: `rest` alone would now confine it to the matrices."""
    for method in ("task_arithmetic", "ties", "model_stock", "linear"):
        assert with_rest(method, {"lam": 1, "rest": "base"}, "average") == {"lam": 1}
    assert with_rest("ties", {"rest_lambda": 1}, "average") == {"rest_lambda": 1, "rest": "average"}
    for method in ("lors", "tsv", "lors_energy"):
        assert with_rest(method, {}, "average") == {"rest": "average"}


def test_no_sparse_part_is_svp(merger: Merger) -> None:
    svp = merger.weights("svp", {"rank": 4, "lam": 0.4, "rest": "task_arithmetic"})
    scaled = _merged(merger, "lors_scaled", low=0.4, sparse=0.0)
    assert max(float((scaled[name] - svp[name]).abs().max()) for name in svp) < 1e-6


def test_one_expert_elects_itself(merger: Merger) -> None:
    name = "expert-0"
    alone = Merger(merger.base, {name: merger.experts[name]}, merger.network, merger.processor)
    assert _apart(_merged(alone, "lors", lam=0.4), _merged(alone, "lors_elect", lam=0.4)) < 1e-6


def test_election_drops_the_minority(merger: Merger) -> None:
    first = merger.experts["expert-0"]
    mirror = {n: merger.base[n] - 0.5 * (first[n] - merger.base[n]) for n in first}
    pair = Merger(merger.base, {"expert-0": first, "expert-1": mirror}, merger.network, merger.processor)
    alone = Merger(merger.base, {"expert-0": first}, merger.network, merger.processor)
    # The mirror's entries have the other sign and half the size everywhere: only the first expert's S remains.
    elected, low = _merged(pair, "lors_elect", lam=0.4), pair.weights("svp", {"rank": 4, "lam": 0.4})
    single, single_low = _merged(alone, "lors", lam=0.4), alone.weights("svp", {"rank": 4, "lam": 0.4})
    name = "model.encoder.layers.0.fc1.weight"
    torch.testing.assert_close(elected[name] - low[name], single[name] - single_low[name], atol=1e-6, rtol=0)


def test_rank_by_energy(merger: Merger) -> None:
    setting = {"density": 0.0, "lam": 1.0, "rest": "base"}
    one = {"expert-0": merger.experts["expert-0"]}
    alone = Merger(merger.base, one, merger.network, merger.processor)
    merged = _held(alone, "lors_energy", {"energy": 0.9, **setting})
    for name in alone.matrices():
        delta = one["expert-0"][name] - merger.base[name]
        change = merged[name] - merger.base[name]
        rank = int((torch.linalg.svdvals(change) > 1e-3).sum())
        held = torch.linalg.svdvals(delta).square().cumsum(0) / delta.square().sum()
        assert held[rank - 1] >= 0.9 and (rank == 1 or held[rank - 2] < 0.9), name


def test_orthogonal_low_rank_parts(merger: Merger) -> None:
    # One expert has nothing to be orthogonal to, and all of its rank: TSV is its delta, and no residual is left.
    alone = Merger(merger.base, {"expert-0": merger.experts["expert-0"]}, merger.network, merger.processor)
    setting = {"density": 0.2, "low": 0.4, "sparse": 0.3, "rest": "task_arithmetic"}
    merged = _held(alone, "lors_orthogonal", setting)
    whole = alone.weights("task_arithmetic", {"lam": 0.4})
    assert max(float((merged[name] - whole[name]).abs().max()) for name in whole) < 1e-4
    # Without the sparse part it is TSV; with it the difference has the entries of S, of what a rank of 128 / 3 leaves.
    name = "model.encoder.layers.0.fc1.weight"
    tsv = merger.weights("tsv", {"lam": 0.4})[name]
    torch.testing.assert_close(_held(merger, "lors_orthogonal", {**setting, "sparse": 0.0})[name], tsv)
    added = _held(merger, "lors_orthogonal", setting)[name] - tsv
    low = merger.weights("svp", {"rank": 42, "lam": 1.0})[name]
    expected = merger.weights("lors", {"rank": 42, "density": 0.2, "lam": 1.0})[name] - low
    torch.testing.assert_close(added, 0.3 * expected, atol=1e-6, rtol=1e-3)
