"""What the written type cannot hold is refused, whatever the type, the method and the way of the merge."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lors
import tiny
from lors import LorsError
from lors.analysis.interference import interference
from lors.experts.decompose import decompose
from lors_kernels.arrays import BFLOAT16

NAME = "model.decoder.layers.0.fc1.weight"
LARGE = {"float32": 3e38, "bfloat16": 3e38, "float16": 6e4}
TYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
METHODS: dict[str, dict[str, Any]] = {
    "lors": {"rank": 1, "density": 0.5, "lam": 1.0},
    "task_arithmetic": {"lam": 1.0},
    "ties": {"density": 1.0, "lam": 1.5},
    "dare_linear": {"density": 0.5, "lam": 1.0},
    "linear": {"normalize": False, "weight": {"a": 1.0, "b": 1.0}},
}


def pair(dtype: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A base, and a model whose difference fits the type while base + 1.5 differences do not."""
    rng = np.random.default_rng(0)
    base = (LARGE[dtype] * 0.5 * rng.choice([-1.0, 1.0], (24, 16))).astype(TYPES[dtype])
    return {NAME: base}, {NAME: (base.astype(np.float64) * 1.9).astype(TYPES[dtype])}


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", TYPES)
def test_overflow_is_one_line(dtype: str, method: str, device: str | None) -> None:
    base, tuned = pair(dtype)
    with pytest.raises(LorsError, match=rf"tensor '{NAME}': ") as error:
        lors.merge_state_dicts(base, {"a": tuned, "b": tuned}, method, device=device, **METHODS[method])
    assert "\n" not in str(error.value)
    assert "reach" in str(error.value) or "overflows" in str(error.value), str(error.value)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_fits_is_merged(dtype: str) -> None:
    base, tuned = pair(dtype)
    merged = lors.merge_state_dicts(base, {"a": tuned}, "task_arithmetic", lam=1.0)[NAME]
    assert np.isfinite(merged.astype(np.float32)).all()


def test_a_decomposition_beyond_float32_is_refused(tmp_path: Path) -> None:
    """delta is finite, and so is every singular vector; their product with a singular value is not."""
    base = tiny.tensors(0, 0.5)
    tuned = {name: value.copy() for name, value in base.items()}
    tuned["model.encoder.layers.0.fc1.weight"][:] = 2e38
    origin, model = tiny.write(tmp_path / "base", base), tiny.write(tmp_path / "a", tuned)
    commands: list[Callable[[], object]] = [
        lambda: lors.merge(origin, {"a": model}, tmp_path / "out"),
        lambda: lors.merge(origin, {"a": model}, tmp_path / "out", device="cpu"),
        lambda: decompose(origin, model, tmp_path / "a.lors.safetensors"),
        lambda: interference(origin, {"a": model, "b": origin}),
    ]
    for command in commands:
        with pytest.raises(LorsError) as error:
            command()
        assert re.fullmatch(
            r"\S+: tensor 'model.encoder.layers.0.fc1.weight': its decomposition overflows float32: "
            r"\d+ entries of singular vectors times values",
            str(error.value),
        ), str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_a_factor_beyond_float32_is_refused() -> None:
    base, tuned = pair("float32")
    for settings in ({"lam": 1e308}, {"lam": 1.0, "weight": {"a": 1e39}}, {"lam": 1e30, "weight": {"a": 1e30}}):
        with pytest.raises(LorsError) as error:
            lors.merge_state_dicts(base, {"a": tuned}, "task_arithmetic", **settings)
        assert "float32" in str(error.value)


# --- files


def model(path: Path, dtype: np.dtype[Any], largest: float, norm: float = 0.0) -> Path:
    """A model of one decomposed matrix and one norm, with one entry of the given size in each."""
    rng = np.random.default_rng(1)
    matrix, vector = rng.standard_normal((24, 16)).astype(dtype), np.zeros(8, dtype)
    matrix[3, 3], vector[2] = largest, norm
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "whisper"}')
    save_file({NAME: matrix, "model.decoder.layer_norm.weight": vector}, path / "model.safetensors")
    return path


F32 = np.dtype(np.float32)
HIGH = 3.4028e38  # a float32 that is infinite in bfloat16, and in float16 when the scale is a power of two


@pytest.mark.parametrize("remainder", ["float16", "int8"])
@pytest.mark.parametrize("norm", [HIGH, 1e30])
def test_expert_files_hold_what_they_are_given_or_are_refused(tmp_path: Path, remainder: str, norm: float) -> None:
    base, tuned, file = (
        model(tmp_path / "b", F32, 0.0),
        model(tmp_path / "t", F32, 1.0, norm),
        tmp_path / "x.lors.safetensors",
    )
    if norm == HIGH and remainder == "float16":
        with pytest.raises(
            LorsError, match="'model.decoder.layer_norm.weight'.*infinity as float16; choose float32 as --rem"
        ):
            decompose(base, tuned, file, rank=1, remainder=remainder)
        assert not file.exists()
        return
    made = decompose(base, tuned, file, rank=1, remainder=remainder)
    assert 0 <= made.error < 1e-2
    lors.merge(base, {"x": file}, tmp_path / "out", rank=1, lam=0.5)
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.decoder.layer_norm.weight"]
    np.testing.assert_allclose(merged[2], 0.5 * norm, rtol=0.01)


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("largest", [HIGH, 1e30])
def test_energies_beyond_float32_make_no_expert_file(tmp_path: Path, values: str, largest: float) -> None:
    """Such a file would be refused as damaged when it is used."""
    base, tuned, file = (
        model(tmp_path / "b", F32, 0.0),
        model(tmp_path / "t", F32, largest),
        tmp_path / "x.lors.safetensors",
    )
    with pytest.raises(LorsError, match=f"'{NAME}': the squares of its difference to the base overflow float32"):
        decompose(base, tuned, file, rank=1, values=values)
    assert not file.exists()


def test_values_below_that_make_one(tmp_path: Path) -> None:
    base, tuned = model(tmp_path / "b", F32, 0.0), model(tmp_path / "t", F32, 1e18)
    for values in ("float32", "float16", "bfloat16"):
        file = tmp_path / f"{values}.lors.safetensors"
        assert decompose(base, tuned, file, rank=1, density=0.2, values=values).error < 1e-2
        lors.merge(base, {"x": file}, tmp_path / f"out-{values}", rank=1, lam=1.0)


@pytest.mark.parametrize("wide", ["base", "expert", "both"])
def test_float64_is_refused_in_one_line(tmp_path: Path, wide: str) -> None:
    f64 = np.dtype(np.float64)
    base = model(tmp_path / "b", f64 if wide != "expert" else F32, 0.0)
    tuned = model(tmp_path / "t", f64 if wide != "base" else F32, 1e300 if wide != "base" else 1.0)
    for command in (
        ["merge", "--base", base, "--expert", f"t={tuned}", tmp_path / "out"],
        ["decompose", base, tuned, "-o", tmp_path / "x.lors.safetensors"],
        ["inspect", tuned, "--base", base],
        ["report", base, f"t={tuned}", f"u={tuned}", "-o", tmp_path / "x.html"],
    ):
        result = run_to_error(*command)
        assert "F64 cannot be merged: expected F32, F16 or BF16" in result, command
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "t"]


def run_to_error(*arguments: object) -> str:
    """The one line of a command that fails."""
    command = [sys.executable, "-c", "from lors.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "options,message",
    [
        (["decompose", "--rank", "inf"], "--rank: expected 0, an integer >= 1 or a fraction"),
        (["decompose", "--rank", "nan"], "--rank: expected 0, an integer >= 1 or a fraction"),
        (["decompose", "--seed", str(2**63)], "--seed: expected an integer in"),
        (["merge", "--lambda", "1e39"], "--lambda: expected a number that float32 can hold"),
        (["merge", "--weight", "t=1e39"], "--weight t: expected a number that float32 can hold"),
        (["merge", "--method", "ties", "--param", "weight=1e39"], "--weight: expected a number that float32 can hold"),
        (["add", "--weight", "1e39"], "--weight: expected a number that float32 can hold"),
        (["add", "--weight", "nan"], "--weight: expected a number that float32 can hold"),
        (["export-lora", "--scale", "1e39"], "--scale: expected a number that float32 can hold"),
        (["export-lora", "--scale", "nan"], "--scale: expected a number that float32 can hold"),
    ],
)
def test_options_beyond_float32_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    base, tuned, file = (
        model(tmp_path / "b", F32, 0.0),
        model(tmp_path / "t", F32, 1.0),
        tmp_path / "x.lors.safetensors",
    )
    decompose(base, tuned, file, rank=1)
    lors.merge(base, {"t": tuned}, tmp_path / "m", rank=1)
    command, *rest = options
    places: dict[str, list[object]] = {
        "decompose": [base, tuned, "-o", tmp_path / "y.lors.safetensors"],
        "merge": ["--base", base, "--expert", f"t={tuned}", tmp_path / "out"],
        "add": [tmp_path / "m", file, "--name", "u"],
        "export-lora": [file, "-o", tmp_path / "adapter"],
    }
    assert message in run_to_error(command, *places[command], *rest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "m", "t", "x.lors.safetensors"]
