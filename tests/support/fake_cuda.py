"""Two GPUs that are not there.

A copy arrives only where a stream is made to wait for it, or the host is: until then its target holds NaN. So what is read,
or written, too early is seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

NAN = float("nan")
COPY = torch.Tensor.copy_


class Stream:
    def __init__(self, device: Any) -> None:
        self.device = torch.device(device)
        self.queue: list[Callable[[], Any]] = []

    def synchronize(self) -> None:
        self.drain(len(self.queue))

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

    defaults: tuple[Stream, Stream]

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


def two_devices(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """torch.cuda as it is with two devices, cuda:0 and cuda:1."""
    FakeCuda.defaults = Stream("cuda:0"), Stream("cuda:1")
    fake = FakeCuda()
    monkeypatch.setattr(Event, "cuda", fake, raising=False)
    for name, value in {
        "Stream": Stream, "Event": Event, "current_stream": fake.current_stream, "device": fake.device,
        "stream": fake.stream, "is_available": lambda: True, "device_count": lambda: 2,
        "mem_get_info": lambda device: (1 << 30, 1 << 30), "empty_cache": lambda: None,
        "memory_reserved": lambda device: 0, "memory_allocated": lambda device: 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    empty, to, copy = torch.empty, torch.Tensor.to, torch.Tensor.copy_

    def fake_to(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        target = arguments[0] if arguments else None
        if not (isinstance(target, torch.device) and target.type == "cuda"):
            return to(self, *arguments, **options)
        if not options.get("non_blocking"):
            return self.clone()
        found = torch.full_like(self, NAN if self.is_floating_point() else 255)
        stream = fake.current_stream(target)
        stream.queue.append(lambda: copy(found, self))
        return found

    def fake_copy(self: torch.Tensor, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not non_blocking:
            return copy(self, other)
        self.fill_(NAN if self.is_floating_point() else 255)
        fake.current_stream().queue.append(lambda: copy(self, other))
        return self

    def fake_empty(*shape: Any, pin_memory: bool = False, device: Any = None, **options: Any) -> torch.Tensor:
        there = device if device is None or "cuda" not in str(device) else "cpu"
        return empty(*shape, device=there, **options)

    monkeypatch.setattr(torch, "empty", fake_empty)
    monkeypatch.setattr(torch.Tensor, "to", fake_to)
    monkeypatch.setattr(torch.Tensor, "copy_", fake_copy)
    return fake


def late(values: torch.Tensor, cuda: FakeCuda) -> torch.Tensor:
    """What a kernel of the current stream computes: there when the stream has come to it."""
    found, copy = torch.full_like(values, NAN), COPY
    cuda.current_stream().queue.append(lambda: copy(found, values))
    return found
