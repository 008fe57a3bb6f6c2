"""The engine's GPU path with the device "cpu": the same batches, slices, budget and account, without streams.

What needs a device (page-locked memory, overlap, real exhaustion) is not shown here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import lors
from lors.engine import gpu
from lors.engine.device import parse_devices
from lors.engine.gpu import DeviceRun
from lors.errors import LorsError
from states import PREFIX, close, states


def merge(base: Any, experts: Any, **options: Any) -> dict[str, Any]:
    settings = {"rank": 3, "density": 0.25, "lam": 0.5, **options}
    settings = {name: value for name, value in settings.items() if value is not None or name == "backend"}
    merged: dict[str, Any] = lors.merge_state_dicts(base, experts, **settings)
    return merged


@pytest.mark.parametrize("backend", [None, "reference"])
def test_same_result_as_on_the_cpu(backend: str | None) -> None:
    base, experts = states()
    close(merge(base, experts, device="cpu", backend=backend), merge(base, experts), base)


def test_a_small_budget_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = states(experts=5)
    seen = []
    attempt = DeviceRun.attempt

    def watch(self: Any, kind: Any, batch: Any, most: int, loaded: Any) -> Any:
        seen.append((len(batch), most))
        return attempt(self, kind, batch, most, loaded)

    monkeypatch.setattr(DeviceRun, "attempt", watch)
    whole = merge(base, experts, device="cpu")
    assert max(seen) == (4, 5)
    seen.clear()
    tight = merge(base, experts, device="cpu", device_memory=700_000)
    assert max(most for _, most in seen) < 5
    for name in base:
        np.testing.assert_array_equal(whole[name], tight[name])


def test_running_out_of_memory_halves_the_work_and_then_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = states()
    whole = merge(base, experts, device="cpu")
    reduce, limit = DeviceRun.reduce, [2]

    def scarce(self: Any, batch: Any, part: Any, group: Any, totals: Any) -> Any:
        if group.pairs > limit[0]:
            totals[0].fill_(float("nan"))  # what a failed attempt leaves behind must not matter
            raise torch.cuda.OutOfMemoryError("tried to allocate")
        return reduce(self, batch, part, group, totals)

    monkeypatch.setattr(DeviceRun, "reduce", scarce)
    found = merge(base, experts, device="cpu")
    for name in base:
        np.testing.assert_array_equal(found[name], whole[name])
    limit[0] = 0
    with pytest.raises(LorsError, match=r"cpu: out of memory for tensor .* alone"):
        merge(base, experts, device="cpu")


def test_budget_below_one_matrix_is_an_error() -> None:
    base, experts = states()
    with pytest.raises(LorsError, match="device memory: expected at least"):
        merge(base, experts, device="cpu", device_memory=1000)


def test_different_rules_per_expert_and_experts_left_out() -> None:
    base, experts = states()
    options: dict[str, Any] = {"rank": {"e0": 2, "e1": 0.5, "e2": 2}, "weight": {"e0": 1.0, "e1": 0.0, "e2": -2.0}}
    close(merge(base, experts, device="cpu", **options), merge(base, experts, **options), base)
    options = {"density": {"e0": 1.0, "e1": 0.0, "e2": 0.5}}
    close(merge(base, experts, device="cpu", **options), merge(base, experts, **options), base)


def test_non_finite_values_are_blamed_on_their_expert() -> None:
    base, experts = states()
    name = PREFIX.format(1) + "fc1.weight"
    experts["e1"][name][3, 4] = np.inf
    with pytest.raises(LorsError, match=r"e1: tensor '.*1\.fc1\.weight': expected finite values, got 1"):
        merge(base, experts, device="cpu")


def test_half_precision_overflow_is_an_error() -> None:
    base, experts = states(dtype=np.float16)
    name = PREFIX.format(0) + "fc1.weight"
    base[name][0, 0] = 6e4
    for state in experts.values():
        state[name][0, 0] = 6.5e4
    with pytest.raises(LorsError, match="float16"):
        merge(base, experts, device="cpu", lam=3.0)


@pytest.mark.parametrize(
    ("device", "message"),
    [("tpu", "expected cpu, cuda or cuda:N, got 'tpu'"), ("cuda:x", "got 'cuda:x'"), ("cpu,cpu", "each device once")],
)
def test_devices_that_make_no_sense(device: str, message: str) -> None:
    with pytest.raises(LorsError, match=message):
        parse_devices(device)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(LorsError, match=r"^device: .*(GPU|PyTorch).*got 'cuda:99'"):
        parse_devices("cuda:99")


def test_devices_share_by_bytes() -> None:
    base, _ = states(layers=4)
    engine: Any = gpu.GpuEngine.__new__(gpu.GpuEngine)
    engine.devices = ("cuda:0", "cuda:1")
    from lors.engine.work import Work
    from lors.experts.source import Spec

    works = [
        Work(name, Spec(np.dtype(np.float32), x.shape), np.dtype(np.float32), (), True) for name, x in base.items()
    ]
    pieces = [next(iter(work.pieces())) for work in works]
    shares = dict(engine.shares(pieces, range(len(pieces))))
    loads = [sum(pieces[i].work.spec.numel for i in share) for share in shares.values()]
    assert sorted(i for share in shares.values() for i in share) == list(range(len(pieces)))
    assert max(loads) - min(loads) <= 64 * 16


# --- state dicts that are on the device: torch tensors and device="cpu"


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


def test_methods_that_need_the_host_say_so() -> None:
    base = {"a.weight": torch.ones(4, 4)}
    with pytest.raises(LorsError, match="method slerp: expected tensors in main memory, got tensors on cpu"):
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
