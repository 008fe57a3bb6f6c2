"""The engine's GPU path with the device "cpu": the same batches, slices, budget and account, without streams.

What needs a device (page-locked memory, overlap, real exhaustion) is not shown here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from devices import merge
from lors.engine import gpu
from lors.engine.device import parse_devices
from lors.engine.gpu import DeviceRun
from lors.errors import LorsError
from states import PREFIX, close, states


@pytest.mark.parametrize("backend", [None, "reference"])
def test_same_result_as_on_the_cpu(backend: str | None) -> None:
    base, experts = states()
    close(merge(base, experts, device="cpu", backend=backend), merge(base, experts), base)


@pytest.mark.parametrize("method", ["lors", "task_arithmetic", "wudi"])
@pytest.mark.parametrize("boost", [{"boost": 0.5}, {"boost_merged": 0.5}], ids=str)
def test_boosted_as_on_the_cpu(method: str, boost: dict[str, float]) -> None:
    base, experts = states()
    own = {"density": 1.0} if method == "lors" else {"density": None, "rank": None}
    settings: dict[str, Any] = {"method": method, **own, **boost}
    close(merge(base, experts, device="cpu", **settings), merge(base, experts, **settings), base)


def test_a_small_budget_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = states(experts=5)
    seen = []
    attempt = DeviceRun.attempt

    def watch(self: Any, batch: Any) -> Any:
        seen.append((len(batch.pieces), batch.most))
        return attempt(self, batch)

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
