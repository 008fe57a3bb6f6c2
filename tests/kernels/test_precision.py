"""Products in float32 whatever has been set, with torch's old switch, its new ones, or both; and all of it restored."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from helpers import require
from lors_kernels.group import MatrixGroup
from lors_kernels.grouped import truncated_svd_group
from lors_kernels.precision import full_precision

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _both_switches() -> None:
    require("precision-switches", hasattr(MATMUL, "fp32_precision"), "torch has the old switch only")


def state() -> tuple[str, str, str, str]:
    """All there is to see, and what the general switch would do from here on."""
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        old = "contradicted"
    now = MATMUL.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    general = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"
    then = MATMUL.fp32_precision
    torch.backends.fp32_precision = general
    return old, *now, then


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


def nothing() -> None:
    pass


def old_switch() -> None:
    torch.set_float32_matmul_precision("medium")


def old_attribute() -> None:
    MATMUL.allow_tf32 = True


def new_switch() -> None:
    MATMUL.fp32_precision = "tf32"


def general_switch() -> None:
    torch.backends.fp32_precision = "tf32"


def both() -> None:
    torch.set_float32_matmul_precision("high")
    MATMUL.fp32_precision = "ieee"


@pytest.mark.parametrize("user", [nothing, old_switch, old_attribute, new_switch, general_switch, both])
def test_float32_inside_and_everything_as_it_was_behind(user: Callable[[], None]) -> None:
    user()
    before = state()
    with full_precision():
        assert MATMUL.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        with full_precision():
            pass
        assert MATMUL.fp32_precision == "ieee"
    assert state() == before
    tuned = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    assert truncated_svd_group(MatrixGroup(None, [[tuned]]), 2).left.shape == (1, 40, 2)
    assert state() == before


def test_threads_share_one_visit() -> None:
    new_switch()
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with full_precision():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    first_in.wait(10)
    with full_precision():
        second_in.set()
        first_out.wait(10)
        assert MATMUL.fp32_precision == "ieee", "who leaves first must not restore it under the other"
    thread.join()
    assert MATMUL.fp32_precision == "tf32"
