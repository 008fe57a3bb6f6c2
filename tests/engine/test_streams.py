"""Streams, events and current devices of the engine's GPU path, with two devices that are not there (`fake_cuda.py`)."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import lors
from fake_cuda import FakeCuda, Stream, late, two_devices
from lors.engine import batches, gpu
from lors.engine.device import Device
from lors.engine.feed import Inputs
from lors.engine.gpu import DeviceRun
from lors.experts.source import MemorySource, Slot
from states import close, states


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return two_devices(monkeypatch)


def test_a_download_waits_for_what_is_computed_and_for_nothing_else(cuda: FakeCuda) -> None:
    device = Device("cuda:1")
    with device.selected():
        computing = cuda.current_stream().queue
        tensor = late(torch.ones(3), cuda)
        host, arrived = device.download(tensor)
        assert len(computing) == 1, "the copy is on a stream of its own"
        behind: list[int] = []
        computing.append(lambda: behind.append(1))
        assert host.isnan().all()
    arrived()  # the current device is number 0 again
    assert (host == 1).all() and not behind


def test_a_merge_on_two_devices_reads_and_writes_nothing_too_early(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = states(experts=5, layers=4)
    settings: dict[str, Any] = {"rank": 3, "density": 0.25, "lam": 0.5}
    expected = lors.merge_state_dicts(base, experts, device="cpu", **settings)
    selected = []
    compute = gpu.rounded
    monkeypatch.setattr(gpu, "rounded", lambda *arguments: late(compute(*arguments), cuda))
    reduce = DeviceRun.reduce

    def watch(self: Any, batch: Any, *rest: Any) -> Any:
        selected.append((self.name, cuda.current, len(batch)))
        return reduce(self, batch, *rest)

    monkeypatch.setattr(DeviceRun, "reduce", watch)
    found = lors.merge_state_dicts(base, experts, device="cuda:0,cuda:1", device_memory=500_000, **settings)
    close(found, expected, base)
    for name in base:
        np.testing.assert_array_equal(found[name], expected[name])
    assert {name for name, _, _ in selected} == {"cuda:0", "cuda:1"} and len(selected) > 4
    assert all(name == f"cuda:{current}" for name, current, _ in selected)


def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST", 20_000)


def test_copies_of_the_next_batch_are_under_way_while_this_one_is_computed(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = states(experts=2, layers=6)
    loads, waits = threading.Semaphore(0), []
    load, reduce = DeviceRun.load, DeviceRun.reduce

    def watched_load(self: Any, step: Any) -> Any:
        found = load(self, step)
        loads.release()
        return found

    def watched_reduce(self: Any, *arguments: Any) -> Any:
        loads.acquire()  # its own
        if len(waits) + 1 < len(list(self.batches())):
            waits.append(loads.acquire(timeout=5))  # and that of the next, which nobody here waits for
            loads.release()
        return reduce(self, *arguments)

    monkeypatch.setattr(DeviceRun, "load", watched_load)
    monkeypatch.setattr(DeviceRun, "reduce", watched_reduce)
    small_batches(monkeypatch)
    found = lors.merge_state_dicts(base, experts, device="cuda:1", rank=3, density=0.25, lam=0.5)
    assert len(waits) > 2 and all(waits), waits
    assert all(np.isfinite(x).all() for x in found.values())


def test_slices_of_one_batch_are_copied_ahead_too(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = states(experts=6, layers=1)
    ahead: list[Any] = []
    load_ahead = DeviceRun.load_ahead
    monkeypatch.setattr(DeviceRun, "load_ahead", lambda self, step: (ahead.append(step), load_ahead(self, step))[1])
    ranks = {name: 2 + t % 2 for t, name in enumerate(experts)}  # experts that do not go together
    lors.merge_state_dicts(base, experts, device="cuda:0", rank=ranks, density=0.25)
    assert sum(not step.first for step in ahead) > 8


def test_a_tensor_is_copied_as_soon_as_it_is_read(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = states(experts=2, layers=2)
    uploaded, waits = threading.Event(), []
    upload, fetch = Device.upload, MemorySource.fetch
    last = list(base)[-1]

    def watched_upload(self: Any, values: Any) -> Any:
        found = upload(self, values)
        uploaded.set()
        return found

    def watched_fetch(self: Any, name: str, *arguments: Any) -> Any:
        if name == last and self.name == "e1":
            waits.append(uploaded.wait(5))
        return fetch(self, name, *arguments)

    monkeypatch.setattr(Device, "upload", watched_upload)
    monkeypatch.setattr(MemorySource, "fetch", watched_fetch)
    lors.merge_state_dicts(base, experts, device="cuda:0", rank=3, density=0.25)
    assert waits == [True]


def test_a_batch_is_written_while_the_next_is_computed(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = states(experts=2, layers=6)
    begun, waits, lock = [0], [], threading.Condition()
    reduce, store, batch_of = DeviceRun.reduce, DeviceRun.store, dict[str, int]()

    def watched_reduce(self: Any, *arguments: Any) -> Any:
        with lock:
            begun[0] += 1
            lock.notify_all()
        return reduce(self, *arguments)

    def watched_store(self: Any, index: int, *arguments: Any) -> Any:
        batch_of[self.pieces[index].work.name] = begun[0]
        if len(batch_of) == 1:
            slow(self.engine)
        return store(self, index, *arguments)

    def slow(engine: Any) -> None:
        sink = engine.sink

        def wait_and_write(name: str, *arguments: Any) -> None:
            if 0 < (batch := batch_of.get(name, 0)) < 4:  # until the batch behind its own is being computed
                with lock:
                    waits.append(lock.wait_for(lambda: begun[0] > batch, 5))
            sink(name, *arguments)

        engine.sink = wait_and_write

    monkeypatch.setattr(DeviceRun, "reduce", watched_reduce)
    monkeypatch.setattr(DeviceRun, "store", watched_store)
    small_batches(monkeypatch)
    lors.merge_state_dicts(base, experts, device="cuda:0", rank=3, density=0.25, lam=0.5)
    assert begun[0] > 4 and len(waits) >= 3 and all(waits), waits


def test_memory_of_one_stream_is_kept_for_the_other(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch hands memory out again by the stream it was taken on, unless told who else reads it."""
    base, experts = states(experts=3, layers=2)
    told: list[tuple[torch.Tensor, Stream]] = []
    uploads: list[torch.Tensor] = []
    upload, download = Device.upload, Device.download
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: told.append((self, stream)))

    def watched_upload(self: Any, values: Any) -> Any:
        uploads.append(upload(self, values))
        return uploads[-1]

    downloads: list[tuple[torch.Tensor, Stream]] = []

    def watched_download(self: Any, tensor: Any) -> Any:
        downloads.append((tensor, self.downloads))
        return download(self, tensor)

    monkeypatch.setattr(Device, "upload", watched_upload)
    monkeypatch.setattr(Device, "download", watched_download)
    lors.merge_state_dicts(base, experts, device="cuda:1", rank=3, density=0.25)
    computing = cuda.defaults[1]
    kept = {tensor.data_ptr() for tensor, stream in told if stream is computing}
    assert uploads and {tensor.data_ptr() for tensor in uploads} <= kept
    assert downloads and all(any(t is tensor and s is stream for t, s in told) for tensor, stream in downloads)
    assert cuda.current == 0 and cuda.streams == list(cuda.defaults)


def test_page_locked_memory_is_used_again_when_the_host_knows_that_it_has_been_read(cuda: FakeCuda) -> None:
    """That a stream waits for the copy is not enough: a reader waits for no stream."""
    done: list[str] = []

    class Slots(list):
        def __iadd__(self, slots: Any) -> Any:
            done.append("handed out")
            return super().__iadd__(slots)

    run = DeviceRun(SimpleNamespace(), "cuda:0", [], [])  # type: ignore[arg-type]
    run.device.slots = Slots()
    event = SimpleNamespace(synchronize=lambda: done.append("read"))
    run.release(Inputs([], [], [Slot()], event))
    assert done == ["read", "handed out"] and len(run.device.slots) == 1


def test_no_room_to_copy_ahead_is_no_error(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = states(experts=2, layers=3)
    settings: dict[str, Any] = {"rank": 3, "density": 0.25, "lam": 0.5}
    expected = lors.merge_state_dicts(base, experts, device="cpu", **settings)
    small_batches(monkeypatch)
    load, refused = DeviceRun.load, []

    def scarce(self: Any, step: Any) -> Any:
        if len(refused) < 4 and threading.current_thread() in ahead:
            load(self, step)  # and then there is no room for the last of it
            refused.append(1)
            raise torch.cuda.OutOfMemoryError("tried to allocate")
        return load(self, step)

    load_ahead, ahead = DeviceRun.load_ahead, set[threading.Thread]()

    def watched(self: Any, step: Any) -> Any:
        ahead.add(threading.current_thread())
        return load_ahead(self, step)

    monkeypatch.setattr(DeviceRun, "load", scarce)
    monkeypatch.setattr(DeviceRun, "load_ahead", watched)
    found = lors.merge_state_dicts(base, experts, device="cuda:0", **settings)
    assert refused
    for name in base:
        np.testing.assert_array_equal(found[name], expected[name])


def test_running_out_of_memory_in_the_middle_of_copies_ahead(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order changes: what has been loaded for another step is given up, and loaded again in its turn."""
    base, experts = states(experts=5, layers=4)
    ranks = {name: 2 + t % 2 for t, name in enumerate(experts)}
    settings: dict[str, Any] = {"rank": ranks, "density": 0.25, "lam": 0.5}
    expected = lors.merge_state_dicts(base, experts, device="cpu", **settings)
    reduce, failed = DeviceRun.reduce, []

    def scarce(self: Any, works: Any, part: Any, group: Any, totals: Any) -> Any:
        if len(failed) < 3 and part.experts[0] >= 2 and len(works) > 1:
            failed.append(part)
            raise torch.cuda.OutOfMemoryError("tried to allocate")
        return reduce(self, works, part, group, totals)

    monkeypatch.setattr(DeviceRun, "reduce", scarce)
    found = lors.merge_state_dicts(base, experts, device="cuda:1", **settings)
    assert len(failed) == 3
    for name in base:
        np.testing.assert_array_equal(found[name], expected[name])
