"""State dicts that are on the device already."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import lors
from devices import merge
from lors.errors import LorsError
from lors.methods import METHODS
from states import PREFIX, states


def resident(base: Any, experts: Any, **options: Any) -> dict[str, Any]:
    """The merge of tensors where they are; numpy comes back, to be compared."""
    from lors_kernels.arrays import to_torch

    base = {name: to_torch(x.copy()) for name, x in base.items()}
    experts = {label: {name: to_torch(x.copy()) for name, x in state.items()} for label, state in experts.items()}
    before = {name: x.clone() for name, x in base.items()}
    merged = merge(base, experts, device="cpu", **options)
    for name, x in merged.items():
        assert isinstance(x, torch.Tensor) and x.shape == base[name].shape
        assert torch.equal(base[name], before[name]), "the inputs stay as they are"
        if x.numel():
            assert x.data_ptr() != base[name].data_ptr(), "and the result is a new tensor"
    return {name: x.float().numpy() if x.is_floating_point() else x.numpy() for name, x in merged.items()}


def mixed_states() -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Matrices, a convolution, vectors, one number, integers and nothing at all; one expert in another dtype."""
    base, experts = states()
    rng = np.random.default_rng(9)
    for state in (base, *experts.values()):
        state["model.encoder.layer_norm.weight"] = rng.standard_normal(16).astype(np.float32)
        state["model.encoder.layer_norm.bias"] = rng.standard_normal(16).astype(np.float32)
        state["model.scale"] = np.array(rng.standard_normal(), np.float32)
        state["model.steps"] = np.arange(3)
        state["model.nothing"] = np.zeros((0, 4), np.float32)
    experts["e1"] = {name: x.astype(np.float16) if x.dtype == np.float32 else x for name, x in experts["e1"].items()}
    return base, experts


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lors", {"rank": 3, "density": 0.25, "lam": 0.5}),
        ("lors", {"rank": {"e0": 2, "e1": 3, "e2": 2}, "rest": "base"}),
        ("lors", {"weight": {"e0": 1.0, "e1": 0.0, "e2": -2.0}, "rest": "average"}),
        ("task_arithmetic", {"lam": 0.3}),
        ("linear", {"weight": {"e0": 0.5, "e1": 0.25, "e2": 0.25}}),
        ("magnitude_prune", {"density": 0.5}),
        ("ties", {"density": 0.4, "lam": 0.7}),
        ("dare_ties", {"density": 0.5}),
        ("dare_linear", {"density": 0.5, "rescale": True}),
        ("breadcrumbs", {"density": 0.6, "gamma": 0.05}),
        ("tsv", {"lam": 0.9, "weight": {"e0": 1.0, "e1": 0.5, "e2": 0.0}}),
        ("tsv", {"target": {"include": ["."], "exclude": [r"\.nothing"]}}),
        ("iso_c", {"lam": 0.9, "weight": {"e0": 1.0, "e1": 0.5, "e2": -0.2}}),
        ("iso_cts", {"lam": 0.9, "common": 0.6, "weight": {"e0": 1.0, "e1": 0.5, "e2": 0.0}}),
        ("tsv", {"boost": 0.5}),
        ("iso_c", {"boost": {"e0": 0.4, "e2": 0.6}, "boost_merged": 0.8}),
        ("lors", {"rank": 3, "density": 1.0, "boost": 0.5, "boost_merged": 0.5}),
        ("task_arithmetic", {"lam": 0.3, "boost_merged": 0.4}),
        ("ties", {"density": 1.0, "boost_merged": 0.4, "rest": "average"}),
        ("dare_linear", {"density": 0.5, "boost": 0.6}),
        ("wudi", {"lam": 0.9, "towards": "mean", "weight": {"e0": 1.0, "e1": 0.0, "e2": 0.4}}),
        ("wudi", {"ridge": 0.1, "target": {"include": ["."], "exclude": [r"\.nothing"]}, "rest_lambda": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_state_dicts_on_the_device_give_what_the_cpu_gives(method: str, settings: dict[str, Any]) -> None:
    base, experts = mixed_states()
    expected: dict[str, Any] = lors.merge_state_dicts(base, experts, method, **settings)
    found = resident(base, experts, method=method, **{"rank": None, "density": None, "lam": None, **settings})
    assert list(found) == list(expected)
    for name, x in found.items():
        moved = np.linalg.norm(expected[name].astype(np.float64) - base[name])
        np.testing.assert_allclose(x, expected[name], rtol=2e-6, atol=2e-5 * moved + 1e-7, err_msg=name)
    assert any((found[name] != base[name]).any() for name in base)


def test_state_dicts_on_the_device_in_slices_change_no_bit() -> None:
    base, experts = mixed_states()
    whole = resident(base, experts)
    tight = resident(base, experts, device_memory=400_000)
    for name in base:
        np.testing.assert_array_equal(whole[name], tight[name])


def test_state_dicts_on_several_devices_are_refused() -> None:
    base = {"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4)}
    other = {"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4, device="meta")}
    with pytest.raises(LorsError, match=r"e0: tensor 'b.weight': expected all tensors on one device, cpu, got meta"):
        merge(base, {"e0": other})
    far = {name: x.to("meta") for name, x in base.items()}
    with pytest.raises(LorsError, match="expected cpu, cuda or cuda:N, got 'meta'"):
        merge(far, {"e0": far})
    with pytest.raises(LorsError, match="device: expected meta, where the tensors are"):
        merge(far, {"e0": far}, device="cpu")


def test_methods_that_need_the_host_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "slerp", replace(METHODS["slerp"], combines_on_device=False))
    base = {"a.weight": torch.ones(4, 4)}
    with pytest.raises(LorsError, match="method slerp: expected tensors in main memory, got tensors on cpu"):
        lors.merge_state_dicts(base, {"e0": base}, "slerp", device="cpu", t=0.5)
    base = {"a.weight": np.ones((4, 4), np.float32)}
    with pytest.raises(LorsError, match="device: method slerp works in main memory alone, got 'cpu'"):
        lors.merge_state_dicts(base, {"e0": base}, "slerp", device="cpu", t=0.5)


def test_state_dicts_on_the_device_blame_the_expert_and_keep_float16_in_range() -> None:
    base, experts = states()
    name = PREFIX.format(1) + "fc1.weight"
    experts["e1"][name][3, 4] = np.nan
    with pytest.raises(LorsError, match=r"e1: tensor '.*1\.fc1\.weight': expected finite values, got 1"):
        resident(base, experts)
    base, experts = states(dtype=np.float16)
    base[name][0, 0] = 6e4
    for state in experts.values():
        state[name][0, 0] = 6.5e4
    with pytest.raises(LorsError, match="float16"):
        resident(base, experts, lam=3.0)
