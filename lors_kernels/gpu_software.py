"""What of a machine's GPU software is too old, in words: driver, torch, and a torch that is slow where it matters."""

from __future__ import annotations

import ctypes
import re
from typing import NamedTuple

Version = tuple[int, int]
TORCH: Version = (2, 4)  # as pyproject.toml asks
BATCHED_EIGH: Version = (2, 12)  # from here on torch.linalg.eigh hands a batch to the library's batched routine


class Software(NamedTuple):
    driver: Version | None  # the newest CUDA it serves; None: no driver
    torch: Version
    torch_cuda: Version | None  # None: built without
    module_cuda: Version | None  # of the CUDA module; None: not built


def installed(runtime: int | None) -> Software:
    """`runtime`: CUDA of the CUDA module as a number, None where it is not built."""
    import torch

    return Software(
        driver_version(),
        version(torch.__version__),
        version(torch.version.cuda) if torch.version.cuda else None,
        _from_number(runtime) if runtime else None,
    )


def too_old(found: Software) -> list[str]:
    """A line for each thing that is too old; empty where everything fits, or there is no GPU software at all.

    A driver serves every CUDA of its major version (minor version compatibility), and older ones.
    """
    lines = []
    if found.torch < TORCH:
        lines.append(f"torch: expected {_text(TORCH)} or newer, got {_text(found.torch)}")
    for who, needs in (("torch is", found.torch_cuda), ("the CUDA module is", found.module_cuda)):
        if found.driver and needs and found.driver[0] < needs[0]:
            lines.append(
                f"driver: expected one for CUDA {needs[0]}, for which {who} built, got one for CUDA {_text(found.driver)}"
            )
    if found.torch_cuda and found.torch < BATCHED_EIGH:
        lines.append(
            f"torch: {_text(found.torch)} solves a batch of symmetric eigenproblems wider than 32 one after another on a GPU: "
            f"seconds in a large merge; {_text(BATCHED_EIGH)} and newer do not"
        )
    return lines


def driver_version() -> Version | None:
    """The newest CUDA that the driver serves; asking needs no device and starts nothing on one."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    return _from_number(number.value) if library.cuDriverGetVersion(ctypes.byref(number)) == 0 else None


def version(text: str) -> Version:
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def _from_number(number: int) -> Version:
    """CUDA's 12040 is 12.4"""
    return number // 1000, number % 1000 // 10


def _text(found: Version) -> str:
    return ".".join(map(str, found))
