"""What `lors doctor` says of drivers and torches that are too old."""

from __future__ import annotations

import ctypes
import json
import re

import pytest

from lors_kernels import __main__, gpu_software
from lors_kernels.backends import cuda, cuda_module
from lors_kernels.gpu_software import Software, too_old

FINE = Software((13, 0), (2, 13), (13, 0), (13, 0))
EIGH = "torch: 2.11 solves a batch of symmetric eigenproblems wider than 32 one after another on a GPU"


@pytest.mark.parametrize(
    ("found", "lines"),
    [
        (FINE, []),
        (FINE._replace(driver=(13, 2), torch_cuda=(12, 8)), []),
        (Software(None, (2, 6), None, (13, 0)), []),  # a CPU's torch: nothing of a GPU matters
        (FINE._replace(driver=(12, 8), torch_cuda=(12, 9), module_cuda=(12, 9)), []),  # minor versions are compatible
        (FINE._replace(driver=(12, 8)), ["torch is built, got one for CUDA 12.8", "the CUDA module is built, got"]),
        (FINE._replace(driver=(12, 8), torch_cuda=(12, 6)), ["for CUDA 13, for which the CUDA module is built"]),
        (FINE._replace(torch=(2, 11)), [EIGH]),
        (Software(None, (2, 3), None, None), ["torch: expected 2.4 or newer, got 2.3"]),
        (FINE._replace(torch=(2, 3)), ["torch: expected 2.4", "2.3 solves a batch"]),
    ],
)
def test_what_is_too_old(found: Software, lines: list[str]) -> None:
    said = too_old(found)
    assert len(said) == len(lines)
    for line, part in zip(said, lines, strict=True):
        assert part in line


def test_versions() -> None:
    assert gpu_software.version("2.11.0+cu130") == (2, 11) and gpu_software.version("12.4") == (12, 4)
    assert gpu_software._from_number(12040) == (12, 4) and gpu_software._from_number(13000) == (13, 0)


class Driver:
    def __init__(self, number: int, status: int = 0) -> None:
        self.number, self.status = number, status

    def cuDriverGetVersion(self, at: ctypes._Pointer[ctypes.c_int]) -> int:
        ctypes.cast(at, ctypes.POINTER(ctypes.c_int))[0] = self.number
        return self.status


@pytest.mark.parametrize(("driver", "expected"), [(Driver(12080), (12, 8)), (Driver(0, 999), None), (None, None)])
def test_the_driver_is_asked(driver: Driver | None, expected: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Driver:
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert gpu_software.driver_version() == expected


def test_the_doctor_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_software, "installed", lambda runtime: FINE._replace(torch=(2, 11)))
    assert __main__.print_diagnosis(as_json=True), "slow is not broken"
    assert EIGH in json.loads(capsys.readouterr().out)["too_old"][0]
    __main__.print_diagnosis()
    assert f"too old    {EIGH}" in capsys.readouterr().out


def test_a_module_that_the_driver_is_too_old_for_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Library:
        arches, runtime = "sm_90", 13000

        def device_count(self) -> tuple[int, str]:
            return 0, "CUDA driver version is insufficient for CUDA runtime version"

    monkeypatch.setattr(cuda_module, "library", Library)
    monkeypatch.setattr(cuda, "built", lambda stem: ["_cuda.so"])
    monkeypatch.setattr(cuda, "installed", lambda runtime: FINE._replace(driver=(12, 8), torch_cuda=(12, 8)))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "driver_version", lambda: (12, 8))
    there, why = cuda.probe()
    assert not there and re.search(r"^built for sm_90; driver: expected one for CUDA 13, .*got .*12\.8", why)
    monkeypatch.setattr(cuda, "installed", lambda runtime: FINE._replace(torch=(2, 11)))  # slow, which is no reason
    with pytest.raises(RuntimeError, match=r"this module has none \(CUDA driver version is insufficient"):
        cuda.probe()
