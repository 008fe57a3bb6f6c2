"""Streams, events and current devices of the engine's GPU path, with two devices that are not there.

Here a copy arrives only where a stream is made to wait for it, or the host is: until then its target holds NaN. So what is
read, or written, too early is seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import lors
from lors.engine import gpu
from lors.engine.device import Device
from lors.engine.gpu import DeviceRun
from states import close, states

NAN = float("nan")


class Stream:
    def __init__(self, device: Any) -> None:
        self.device = torch.device(device)
        self.queue: list[Callable[[], Any]] = []

    def drain(self, count: int) -> None:
        for action in self.queue[:count]:
            action()
        self.queue[:count] = [lambda: None] * min(count, len(self.queue))

    def wait_event(self, event: Event) -> None:
        event.synchronize()

    def wait_stream(self, other: Stream) -> None:
        other.drain(len(other.queue))

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event


class Event:
    cuda: FakeCuda

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self.cuda.current_stream()
        self.count = len(self.stream.queue)

    def synchronize(self) -> None:
        self.stream.drain(self.count)


class FakeCuda(threading.local):
    """`torch.cuda` with two devices: each thread has a current one, and a current stream on each."""

    defaults = tuple(Stream(f"cuda:{number}") for number in (0, 1))
    late = True

    def __init__(self) -> None:
        self.current, self.streams = 0, list(self.defaults)

    def current_stream(self, device: Any = None) -> Stream:
        return self.streams[self.current if device is None else torch.device(device).index]

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, torch.device(device).index
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        index = stream.device.index
        before, self.streams[index] = self.streams[index], stream
        try:
            with self.device(stream.device):
                yield
        finally:
            self.streams[index] = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(Event, "cuda", fake, raising=False)
    for name, value in {
        "Stream": Stream, "Event": Event, "current_stream": fake.current_stream, "device": fake.device,
        "stream": fake.stream, "is_available": lambda: True, "device_count": lambda: 2,
        "mem_get_info": lambda device: (1 << 30, 1 << 30),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    empty, to, copy = torch.empty, torch.Tensor.to, torch.Tensor.copy_

    def fake_to(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        target = arguments[0] if arguments else None
        if not (isinstance(target, torch.device) and target.type == "cuda"):
            return to(self, *arguments, **options)
        found = torch.full_like(self, NAN)
        stream = fake.current_stream(target)
        stream.queue.append(lambda: copy(found, self))
        return found

    def fake_copy(self: torch.Tensor, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not non_blocking:
            return copy(self, other)
        self.fill_(NAN)
        fake.current_stream().queue.append(lambda: copy(self, other))
        return self

    def fake_empty(*shape: Any, pin_memory: bool = False, device: Any = None, **options: Any) -> torch.Tensor:
        there = device if device is None or "cuda" not in str(device) else "cpu"
        return empty(*shape, device=there, **options)

    monkeypatch.setattr(torch, "empty", fake_empty)
    monkeypatch.setattr(torch.Tensor, "to", fake_to)
    monkeypatch.setattr(torch.Tensor, "copy_", fake_copy)
    return fake


def test_a_download_is_waited_for_on_the_stream_of_its_device(cuda: FakeCuda) -> None:
    device = Device("cuda:1")
    done = []

    def copy_(host: Any, tensor: Any, non_blocking: bool) -> None:
        cuda.current_stream(tensor.device).queue.append(lambda: done.append(True))

    host_type = type("Host", (), {"copy_": copy_})
    device.torch = SimpleNamespace(cuda=torch.cuda, empty=lambda *shape, **options: host_type())
    tensor = SimpleNamespace(shape=(2,), dtype=torch.float32, device=torch.device("cuda:1"))
    _, arrived = device.download(tensor)  # the current device is number 0
    arrived()
    assert done == [True]


def test_a_merge_on_two_devices_reads_and_writes_nothing_too_early(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = states(experts=5, layers=4)
    settings: dict[str, Any] = {"rank": 3, "density": 0.25, "lam": 0.5}
    expected = lors.merge_state_dicts(base, experts, device="cpu", **settings)
    selected = []
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


def test_copies_of_the_next_batch_are_under_way_while_this_one_is_computed(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = states(experts=2, layers=6)
    uploads, waits = threading.Semaphore(0), []
    upload, reduce = DeviceRun.upload, DeviceRun.reduce

    def watched_upload(self: Any, *arguments: Any) -> Any:
        found = upload(self, *arguments)
        uploads.release()
        return found

    def watched_reduce(self: Any, *arguments: Any) -> Any:
        uploads.acquire()  # its own
        waits.append(uploads.acquire(timeout=5))  # and that of the next, which nobody here waits for
        uploads.release()
        return reduce(self, *arguments)

    monkeypatch.setattr(DeviceRun, "upload", watched_upload)
    monkeypatch.setattr(DeviceRun, "reduce", watched_reduce)
    monkeypatch.setattr(gpu, "BATCH_BYTES", 20_000)
    found = lors.merge_state_dicts(base, experts, device="cuda:1", rank=3, density=0.25, lam=0.5)
    assert len(waits) > 2 and all(waits[:-1]), waits
    assert all(np.isfinite(x).all() for x in found.values())


def test_no_room_to_copy_ahead_is_no_error(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = states(experts=2, layers=3)
    settings: dict[str, Any] = {"rank": 3, "density": 0.25, "lam": 0.5}
    expected = lors.merge_state_dicts(base, experts, device="cpu", **settings)
    monkeypatch.setattr(gpu, "BATCH_BYTES", 20_000)
    upload, refused = Device.upload, []

    def scarce(self: Any, values: Any) -> Any:
        if len(refused) < 4 and threading.current_thread() in getattr(self, "seen", ()):
            refused.append(1)
            raise torch.cuda.OutOfMemoryError("tried to allocate")
        return upload(self, values)

    load_ahead = DeviceRun.load_ahead

    def watched(self: Any, *arguments: Any) -> Any:
        self.device.seen = {threading.current_thread()}
        return load_ahead(self, *arguments)

    monkeypatch.setattr(Device, "upload", scarce)
    monkeypatch.setattr(DeviceRun, "load_ahead", watched)
    found = lors.merge_state_dicts(base, experts, device="cuda:0", **settings)
    assert refused
    for name in base:
        np.testing.assert_array_equal(found[name], expected[name])
