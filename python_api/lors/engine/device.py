"""One device: its streams, its page-locked memory, copies to and from it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from lors_kernels.arrays import BFLOAT16, dtype_name

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
    """Streams and page-locked memory of one device; on "cpu" all of it is nothing, and the rest of the code the same."""

    def __init__(self, name: str) -> None:
        import torch

        self.torch, self.device = torch, torch.device(name)
        self.real = self.device.type == "cuda"
        self.copies = torch.cuda.Stream(self.device) if self.real else None
        self.slots: list[Slot] = []

    def slot(self) -> Slot:
        try:
            return self.slots.pop()  # a reader and the run itself may ask at the same time
        except IndexError:
            return PinnedSlot() if self.real else Slot()

    def selected(self) -> AbstractContextManager[Any]:
        """Makes it the thread's current device: kernels, events and page-locked memory go by that."""
        return self.torch.cuda.device(self.device) if self.real else nullcontext()

    def copying(self) -> AbstractContextManager[Any]:
        return self.torch.cuda.stream(self.copies) if self.real else nullcontext()

    def upload(self, values: np.ndarray) -> Any:
        """A copy of `values` on the device; on the copy stream, the caller has to wait for it."""
        from lors_kernels.arrays import to_torch

        tensor = to_torch(values)
        return tensor.to(self.device, non_blocking=True) if self.real else tensor.clone()

    def copied(self) -> Any:
        """An event behind the copies so far."""
        return self.copies.record_event() if self.copies is not None else None

    def ready(self, tensors: Sequence[Any], copied: Any) -> None:
        """Lets the computing stream wait for the copies, though not for those of the next batch that may be under way
        behind them, and keeps their memory from being reused before it is done."""
        if copied is None:
            return
        stream = self.torch.cuda.current_stream(self.device)
        stream.wait_event(copied)
        for tensor in tensors:
            tensor.record_stream(stream)

    def download(self, tensor: Any) -> Any:
        """A host copy under way; call the second of the returned pair before reading the first."""
        if not self.real:
            return tensor, lambda: None
        host = self.torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        event = self.torch.cuda.Event()
        event.record(self.torch.cuda.current_stream(self.device))  # not that of the current device
        return host, event.synchronize

    def out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, self.torch.cuda.OutOfMemoryError)


def to_numpy(host: Any, dtype: np.dtype[Any]) -> np.ndarray:
    import torch

    return host.view(torch.uint16).numpy().view(dtype) if host.dtype == torch.bfloat16 else host.numpy()  # type: ignore[no-any-return]


def numpy_dtype(value: Any) -> np.dtype[Any]:
    return BFLOAT16 if dtype_name(value) == "bfloat16" else np.dtype(dtype_name(value))
