"""One device: its streams, its page-locked memory, copies to and from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from lors_kernels.arrays import BFLOAT16, dtype_name, to_torch

from ..errors import SettingError, first_line
from ..experts.source import Slot


def parse_devices(text: str) -> list[str]:
    """ "cuda" or "cuda:0,cuda:1" -> devices that exist; LorsError otherwise. "cpu" runs the same code without a GPU."""
    import torch

    devices = []
    for part in text.replace(" ", "").split(","):
        kind, _, number = part.partition(":")
        if kind not in ("cuda", "cpu") or (number and not number.isdigit()):
            raise SettingError("device", f"expected cpu, cuda or cuda:N, got {part!r}")
        if kind == "cuda":
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if count == 0:
                raise SettingError("device", f"{_no_gpu()}, got {part!r}")
            if int(number or 0) >= count:
                raise SettingError("device", f"expected one of the {count} GPUs PyTorch sees here, got {part!r}")
            part = f"cuda:{number or 0}"
        if part in devices:
            raise SettingError("device", f"expected each device once, got {part!r} twice")
        devices.append(part)
    return devices


def _no_gpu() -> str:
    """Why PyTorch sees none."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"expected a PyTorch that is built for GPUs, this one ({torch.__version__}) is for CPUs only"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"PyTorch sees no GPU: {first_line(error)}"
    return "PyTorch sees no GPU: CUDA_VISIBLE_DEVICES hides all of them, or there is none"


class PinnedSlot(Slot):
    """A reusable buffer in page-locked memory, from which copies to a device run beside everything else."""

    def array(self, count: int, dtype: np.dtype[Any]) -> np.ndarray:
        import torch

        nbytes = count * dtype.itemsize
        if self._bytes.size < nbytes:
            self._bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return self._bytes[:nbytes].view(dtype)


class Device:
    """Streams and page-locked memory of one device; on "cpu" all of it is nothing, and the rest of the code the same.

    Three streams: copies to the device, copies from it, and the one on which it computes, which is torch's current one. Each
    waits for another by an event alone; the host waits where it reads or reuses memory.
    """

    def __init__(self, name: str) -> None:
        import torch

        self.torch, self.device = torch, torch.device(name)
        self.real = self.device.type == "cuda"
        self.uploads, self.downloads = (torch.cuda.Stream(self.device) if self.real else None for _ in range(2))
        self.slots: list[Slot] = []

    def slot(self) -> Slot:
        try:
            return self.slots.pop()  # readers and the run itself may ask at the same time
        except IndexError:
            return PinnedSlot() if self.real else Slot()

    def selected(self) -> AbstractContextManager[Any]:
        """Makes it the thread's current device: kernels, events and page-locked memory go by that."""
        return self.torch.cuda.device(self.device) if self.real else nullcontext()

    def uploading(self) -> AbstractContextManager[Any]:
        return self.torch.cuda.stream(self.uploads) if self.real else nullcontext()

    def upload(self, values: np.ndarray) -> Any:
        """A copy of `values` on the device, under way on the stream of uploads; see `ready`."""
        tensor = to_torch(values)
        if self.uploads is None:
            return tensor.clone()
        with self.uploading():
            return tensor.to(self.device, non_blocking=True)

    def uploaded(self) -> Any:
        """An event behind the uploads so far."""
        return self.uploads.record_event() if self.uploads is not None else None

    def ready(self, tensors: Sequence[Any], uploaded: Any) -> None:
        """Lets the computing stream wait for uploads, though not for those of the next batch that may be under way behind
        them, and keeps their memory from being reused before it is done."""
        if uploaded is None:
            return
        stream = self.torch.cuda.current_stream(self.device)
        stream.wait_event(uploaded)
        for tensor in tensors:
            tensor.record_stream(stream)

    def download(self, tensor: Any) -> tuple[Any, Any]:
        """A host copy under way, behind what has been computed so far and beside what is computed next; call the second
        of the pair before reading the first."""
        if self.downloads is None:
            return tensor, lambda: None
        computed = self.torch.cuda.current_stream(self.device).record_event()
        host = self.torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with self.torch.cuda.stream(self.downloads):
            self.downloads.wait_event(computed)
            host.copy_(tensor, non_blocking=True)
            arrived = self.downloads.record_event()
        tensor.record_stream(self.downloads)
        return host, arrived.synchronize

    def free_memory(self) -> int:
        """Bytes that nobody has taken, with those that torch keeps for reuse."""
        cuda = self.torch.cuda
        kept = cuda.memory_reserved(self.device) - cuda.memory_allocated(self.device)
        return int(cuda.mem_get_info(self.device)[0]) + kept

    def settle(self) -> None:
        """Waits for all uploads."""
        if self.uploads is not None:
            self.uploads.synchronize()

    def out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, self.torch.cuda.OutOfMemoryError)


def host_memory() -> int:
    """Bytes of main memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def to_numpy(host: Any, dtype: np.dtype[Any]) -> np.ndarray:
    import torch

    return host.view(torch.uint16).numpy().view(dtype) if host.dtype == torch.bfloat16 else host.numpy()  # type: ignore[no-any-return]


def numpy_dtype(value: Any) -> np.dtype[Any]:
    return BFLOAT16 if dtype_name(value) == "bfloat16" else np.dtype(dtype_name(value))
