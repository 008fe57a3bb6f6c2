"""FusionBench: its TSV-M and Iso-C on the same tensors, and our algorithm inside it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lors
from calibrated import statistics
from helpers import module
from lors import LorsError
from lors.experts.statistics import read_statistics

module("fusion_bench", "peers")
from fusion_bench import BaseModelPool
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
from fusion_bench.method.wudi.wudi import wudi_merging

from lors.integrations.fusion_bench import LoRSMerging

SHAPES = {"a.layers.0.attention.q_proj.weight": (48, 40), "wide.weight": (24, 60), "b.bias": (17,)}


def states(count: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    torch.manual_seed(0)
    base = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    return base, {f"t{t}": {k: v + 0.1 * torch.randn(v.shape) for k, v in base.items()} for t in range(count)}


def trained(count: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A network, and what a few steps on `count` tasks make of it: strong directions, weak ones, and roundings."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Tanh(), torch.nn.Linear(48, 40))
    base = {name: value.clone() for name, value in model.state_dict().items()}
    experts = {}
    for t in range(count):
        model.load_state_dict(base)
        inputs, wanted = torch.randn(4, 64), torch.randn(4, 40)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(8):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(inputs), wanted).backward()
            optimizer.step()
        experts[f"t{t}"] = {name: value.clone() for name, value in model.state_dict().items()}
    return base, experts


def merged_task_vector(function: Any, base: dict[str, Any], experts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Theirs, of our float32 differences, in float64: its arithmetic in float32 is good to 1e-5 and no better."""
    vectors = [{key: (state[key] - base[key]).double() for key in base} for state in experts.values()]
    return function(vectors, accelerator="cpu")  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts"])
@pytest.mark.parametrize("source", [states, trained])
def test_same_as_fusion_bench(source: Any, method: str, count: int) -> None:
    """FusionBench treats every matrix and averages the rest. What remains is the rounding of the weights."""
    base, experts = source(count)
    common_space = partial(iso_cts, common_space_fraction=0.8)
    theirs = {"tsv": compute_and_sum_svd_mem_reduction, "iso_c": iso_c, "iso_cts": common_space}[method]
    want = merged_task_vector(theirs, base, experts)
    got = lors.merge_state_dicts(base, experts, method, target={"include": ["."]}, rest="average")
    for name in base:
        update = got[name].double() - base[name].double()
        assert (update - want[name]).norm() <= 1e-5 * want[name].norm() + 2.0**-24 * base[name].norm(), name


def test_the_gradient_solution_of_wudi_converges_to_ours() -> None:
    """Within 2 %: a ridge of 0.01 is left of ours. Their Adam steps have a length of 1e-5, so the differences are small."""
    torch.manual_seed(0)
    shapes = {"square.weight": (48, 48), "tall.weight": (60, 24)}
    vectors = [{name: 1e-4 * torch.randn(shape).double() for name, shape in shapes.items()} for _ in range(3)]
    experts = {f"t{t}": {name: x.float() for name, x in vector.items()} for t, vector in enumerate(vectors)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    ours = lors.merge_state_dicts(base, experts, "wudi", target={"include": ["."]}, ridge=0.01)
    apart = []
    for steps in (0, 10, 100):
        theirs = wudi_merging(vectors, accelerator="cpu", iter_num=steps)
        apart.append(max(float((theirs[n].detach() - ours[n]).norm() / ours[n].norm()) for n in shapes))
    assert apart[0] > 0.5 and apart[0] > 2 * apart[1] and apart[2] < 0.02, apart


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_regmean_is_theirs(alpha: float, tmp_path: Path) -> None:
    """Of the same inputs; our file keeps correlations in float16 and a ridge of 1e-6 is added."""
    base, experts = states(3)
    matrices = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
    files = statistics(tmp_path, tuple(experts), matrices)
    read = [
        {n.removesuffix(".weight"): torch.from_numpy(read_statistics(files[t], n, s)) for n, s in matrices.items()}
        for t in experts
    ]
    lists = {name: [state[name].double() for state in experts.values()] for name in base}
    want = merging_with_regmean_weights(lists, read, reduce_non_diagonal_ratio=alpha)
    settings = {"statistics": files, "alpha": alpha, "ridge": 1e-6, "target": {"include": ["weight"]}}
    got = lors.merge_state_dicts(base, experts, "regmean", **settings)
    for name in base:
        moved = (want[name] - base[name]).norm()
        assert (got[name] - want[name]).norm() <= 1e-4 * moved + 2.0**-24 * base[name].norm(), name


def test_where_theirs_is_not_defined_ours_keeps_to_the_range_of_the_sum() -> None:
    """On purpose unlike theirs: singular value 0 has no direction of its own, whichever LAPACK happens to return."""
    base = {"w.weight": torch.zeros(20, 16)}
    vector = torch.outer(torch.arange(1.0, 21.0), torch.ones(16))
    merged = lors.merge_state_dicts(base, {"t": {"w.weight": vector}}, "iso_c", target={"include": ["."]})["w.weight"]
    assert torch.allclose(merged, vector / 16, atol=1e-5)


class Tiny(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(32, 24), torch.nn.Linear(24, 20)])


def pool(*names: str) -> Any:
    return BaseModelPool({name: Tiny(seed) for seed, name in enumerate(names)})


@pytest.mark.parametrize(
    "settings", [{"rank": 3, "density": 0.1}, {"method": "ties", "density": 0.3, "weight": {"x": 2.0}}]
)
def test_the_algorithm_inside_fusion_bench(settings: dict[str, Any]) -> None:
    model = LoRSMerging(lam=0.5, **settings).run(pool("_pretrained_", "x", "y"))
    method = {"method": settings.get("method", "lors")}
    base, *experts = (Tiny(seed).state_dict() for seed in range(3))
    rest = {key: value for key, value in settings.items() if key != "method"}
    want = lors.merge_state_dicts(base, dict(zip("xy", experts, strict=True)), lam=0.5, **method, **rest)
    for name, value in model.state_dict().items():
        assert torch.equal(value, want[name]) and not torch.equal(value, base[name])


def test_target_of_its_command_line() -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.create(
        {"_target_": "lors.integrations.fusion_bench.LoRSMerging", "rank": 2, "target": {"include": ["layers.0"]}}
    )
    algorithm = instantiate(config)
    model = algorithm.run(pool("_pretrained_", "x"))
    assert isinstance(algorithm, LoRSMerging) and not torch.equal(model.layers[0].weight, Tiny(0).layers[0].weight)


def test_bad_pools_and_parameters() -> None:
    with pytest.raises(LorsError, match="expected a pretrained model"):
        LoRSMerging().run(pool("x", "y"))
    with pytest.raises(LorsError, match="unknown parameter 'densty' of method lors"):
        LoRSMerging(densty=0.5).run(pool("_pretrained_", "x"))
    assert np.isfinite(LoRSMerging().run(pool("_pretrained_", "x")).layers[0].weight.detach().numpy()).all()
