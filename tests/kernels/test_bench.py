"""`lors bench`: what it says is right is right, and what is not is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lors_kernels
import tiny
from lors_kernels.testing import bench
from lors_kernels.testing.peaks import Peaks

COMMAND = [sys.executable, "-c", "from lors.cli import main; main()", "bench"]
PEAKS = {"cpu": Peaks(1e11, 0.0, {1 << 62: 1e10})}
SMALL = (96, 64)


def measured(shapes: list[tuple[int, int]] | None = None, **options: Any) -> list[bench.Row]:
    settings = {"dtype": "float32", "rank": 3, "density": 0.2, "peaks": PEAKS} | options
    return list(bench.rows(["cpu"], shapes or [SMALL, SMALL[::-1]], **settings))


@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_every_operation_is_measured_and_right(dtype: str) -> None:
    found = measured(dtype=dtype)
    assert {row.operation for row in found} == {
        *bench.OPERATIONS, *(f"{name} (noise)" for name in bench.DECOMPOSING)
    }  # fmt: skip
    assert not [row for row in found if not row.ok]
    assert all(row.ms > 0 and row.plain_ms > 0 and row.peak_share > 0 for row in found)


def test_the_table_of_operations_is_the_package_s() -> None:
    public = {name for name in lors_kernels.__all__ if name in bench.OPERATIONS or hasattr(bench.plain, name)}
    assert public == set(bench.OPERATIONS)


@pytest.mark.parametrize("operation", bench.OPERATIONS)
def test_a_wrong_operation_is_found(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry of what an operation gives back, or writes, is off by a tenth of the largest."""
    right = getattr(lors_kernels, operation)

    def wrong(*arguments: Any, **options: Any) -> Any:
        done = right(*arguments, **options)
        if options.get("backend") != "cpu":
            return done  # what the benchmark prepares
        return SPOILED[operation](done, arguments)

    of = bench.Matrices(SMALL, "float32", "cpu", 3, 0.2)
    work = bench.OPERATIONS[operation](of)
    error, allowed = work.check(work.ours("cpu"))
    assert error <= allowed
    monkeypatch.setattr(lors_kernels, operation, wrong)
    error, allowed = work.check(work.ours("cpu"))
    assert error > allowed


def nudge(x: Any) -> None:
    """The entry of the largest magnitude, which is kept everywhere."""
    flat = x.reshape(-1)
    flat[abs(flat).argmax()] *= 1.1


def written(done: Any, arguments: tuple[Any, ...]) -> Any:
    nudge(arguments[0])
    return done


def returned(done: Any, arguments: tuple[Any, ...]) -> Any:
    nudge(done)
    return done


def masked(done: Any, arguments: tuple[Any, ...]) -> Any:
    """The lowest entry that is kept is another one."""
    done = done.clone()
    done.view(-1)[[int(done.view(-1).int().argmin()), int(done.view(-1).int().argmax())]] ^= True
    return done


SPOILED = {
    "gram_apply": returned,
    "truncated_svd": lambda done, arguments: done._replace(left=done.left * 1.001),
    "residual_threshold": lambda done, arguments: done._replace(value=done.value * 1.1),
    "merge_update": written,
    "apply_update": written,
    "ties_update": written,
    "sparse_part": lambda done, arguments: done._replace(mask=done.mask ^ 1),
    "sparse_update": written,
    "topk_mask": masked,
    "lors_delta": returned,
}


def test_threads_of_torch_are_put_back() -> None:
    before = torch.get_num_threads()
    with bench._as_many_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_peaks_of_the_processor() -> None:
    found = bench.cpu_peaks(1)
    assert found.multiply > 1e9 and len(found.read) >= 2 and list(found.read) == sorted(found.read)
    assert all(rate > 1e7 for rate in found.read.values())
    assert found.floor(0, 100, 0) == 100 / found.multiply


def test_command_exits_with_1_where_something_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "OPERATIONS", {"topk_mask": bench.topk_mask})
    monkeypatch.setattr(bench, "DECOMPOSING", ())
    assert bench.bench_command(["cpu"], shapes=[SMALL])
    monkeypatch.setattr(lors_kernels, "topk_mask", lambda x, k, **_: x > x.max())
    assert not bench.bench_command(["cpu"], shapes=[SMALL])


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)


def test_command(tmp_path: Path) -> None:
    base = tiny.family(tmp_path)["base"]
    done = command("--backend", "cpu", "--checkpoint", str(base), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"machine", "threads", "peaks", "rows"} == set(found)
    assert all(row["ok"] for row in found["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "cud"], "--backend: expected one of"),
        (["--dtype", "float8"], "--dtype: expected one of float32, float16, bfloat16, got 'float8'"),
        (["--density", "0"], "--density: expected more than 0 and at most 1, got 0.0"),
    ],
)
def test_command_with_options_that_are_none(arguments: list[str], message: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
