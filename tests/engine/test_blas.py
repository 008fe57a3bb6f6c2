"""BLAS threads beside the engine's workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

import lors
from lors.engine.blas import one_thread_each
from lors.methods import iso_c


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_workers_have_one_blas_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    polar = iso_c.polar

    def watch(x: torch.Tensor) -> Any:
        seen.append(blas_threads() | {torch.get_num_threads()})
        return polar(x)

    monkeypatch.setattr(iso_c, "polar", watch)
    state = {f"layers.{i}.q_proj.weight": np.eye(4, dtype=np.float32) * (i + 1) for i in range(3)}
    torch.set_num_threads(2)
    with threadpool_limits(2, user_api="blas"):
        lors.merge_state_dicts(state, {"t": state}, "iso_c", target={"include": ["."]}, threads=2)
        assert blas_threads() == {2} == {torch.get_num_threads()}, "as it was before"
    assert seen == [{1}] * 3


def test_the_last_of_several_lifts_the_limit() -> None:
    with threadpool_limits(2, user_api="blas"):
        first, second = one_thread_each(), one_thread_each()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert blas_threads() == {1}
        second.__exit__(None, None, None)
        assert blas_threads() == {2}
