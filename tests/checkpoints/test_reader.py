"""Reading: every lie a weight file can tell is one clear line; what is true is read bit for bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from lors.checkpoints.compatibility import dtype_kind
from lors.checkpoints.reader import open_checkpoint
from lors.checkpoints.tensor_info import DTYPES
from lors.errors import LorsError
from weights import error_of, raw_file, whisper, write

# ---------------------------------------------------------------------------------------------------- reads


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    specs=st.lists(
        st.tuples(
            st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "C64"]),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_what_safetensors_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, specs: list[tuple[str, list[int]]]
) -> None:
    rng = np.random.default_rng(0)
    tensors = {}
    for index, (code, shape) in enumerate(specs):
        values = rng.integers(0, 2, shape) if code == "BOOL" else rng.integers(0, 100, shape)
        tensors[f"tensor.{index}"] = np.asarray(values).astype(DTYPES[code])
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    path.write_bytes(save(tensors, {"made": "by hand"}))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == {"made": "by hand"}
        assert checkpoint.tensors.keys() == tensors.keys()
        for (code, shape), (name, expected) in zip(specs, tensors.items(), strict=True):
            info, got = checkpoint.tensors[name], checkpoint.read(name)
            assert (info.code, info.shape, info.nbytes) == (code, tuple(shape), expected.nbytes)
            assert got.dtype == expected.dtype and got.shape == expected.shape and got.tobytes() == expected.tobytes()


def test_ranges_into_the_callers_memory(tmp_path: Path) -> None:
    values = np.arange(24).astype(ml_dtypes.bfloat16).reshape(2, 3, 4)
    path = tmp_path / "x.safetensors"
    save_file({"other": np.zeros(3, np.float32), "a": values}, path)
    with open_checkpoint(path) as checkpoint:
        checkpoint.prefetch("a")
        out = np.full(30, -1, ml_dtypes.bfloat16)
        assert checkpoint.read("a", out[5:15].reshape(2, 5), 7, 17).base is not None
        expected = np.concatenate([np.full(5, -1), np.arange(7, 17), np.full(15, -1)])
        np.testing.assert_array_equal(out.astype(int), expected)
        assert checkpoint.read("a", start=20).shape == (4,)
        assert checkpoint.read("a", start=24).shape == (0,)
        for wrong in (np.empty(24, np.float32), np.empty(23, values.dtype), np.empty(48, values.dtype)[::2]):
            with pytest.raises(ValueError, match="C-contiguous with 24 elements of bfloat16"):
                checkpoint.read("a", wrong)
        for start, stop in ((-1, 3), (5, 4), (0, 25)):
            with pytest.raises(ValueError, match="range"):
                checkpoint.read("a", None, start, stop)
        with pytest.raises(LorsError, match="no tensor 'b'"):
            checkpoint.read("b")
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read("a")


def test_reads_from_many_threads(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.full((50, 1000), i, np.float32) + np.arange(1000, dtype=np.float32) for i in range(8)}
    path = write(tmp_path / "model", tensors)
    pieces = [(name, start) for name in tensors for start in range(0, 50_000, 5_000)] * 4
    random.Random(0).shuffle(pieces)

    with open_checkpoint(path) as checkpoint:

        def same(piece: tuple[str, int]) -> bool:
            name, start = piece
            got = checkpoint.read(name, np.empty(5_000, np.float32), start, start + 5_000)
            return bool((got == tensors[name].reshape(-1)[start : start + 5_000]).all())

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(same, pieces))


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "model", {"first": np.zeros(100, np.float32), "last": np.zeros(100, np.float32)})
    with open_checkpoint(path) as checkpoint:
        os.truncate(path / "model.safetensors", checkpoint.tensors["last"].offset + 10)
        checkpoint.read("first")
        with pytest.raises(LorsError, match=r"model.safetensors: the file shrank .*'last' needs 400 bytes .* got 10"):
            checkpoint.read("last")


def test_small_floats_are_listed_and_packed_ones_not_read(tmp_path: Path) -> None:
    header = {
        "f8": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]},
        "f4": {"dtype": "F4", "shape": [4], "data_offsets": [2, 4]},
    }
    with open_checkpoint(raw_file(tmp_path / "x.safetensors", header, b"\x38\x40\x12\x34")) as checkpoint:
        assert [info.code for info in checkpoint.tensors.values()] == ["F8_E4M3", "F4"]
        assert {dtype_kind(info) for info in checkpoint.tensors.values()} == {"8-bit float"}
        assert checkpoint.read("f8").astype(float).tolist() == [1.0, 2.0]
        with pytest.raises(LorsError, match="F4 values are packed"):
            checkpoint.read("f4")


# -------------------------------------------------------------------------------------------------- sources


def sharded(path: Path, weight_map: Any) -> Path:
    path.mkdir()
    save_file({"a": np.zeros(2, np.float32), "b": np.ones(3, np.float32)}, path / "s1.safetensors")
    save_file({"c": np.full(4, 2, np.float32)}, path / "s2.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_sharded(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m", {"a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"})
    with open_checkpoint(path) as checkpoint:
        assert [file.name for file in checkpoint.files] == ["s1.safetensors", "s2.safetensors"]
        assert checkpoint.read("b").tolist() == [1, 1, 1] and checkpoint.read("c").tolist() == [2, 2, 2, 2]
        assert checkpoint.name == "m" and checkpoint.hub_id is None


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({"a": "s1.safetensors", "b": "s3.safetensors"}, "shard 's3.safetensors', which is not there"),
        (
            {"a": "s1.safetensors", "b": "s1.safetensors", "c": "s1.safetensors"},
            "'c' is said to be in 's1.safetensors'",
        ),
        ({"a": "s1.safetensors", "x": "s2.safetensors"}, "'x' is said to be in 's2.safetensors'"),
        ({"a": "s1.safetensors", "c": "s2.safetensors"}, "does not list 1 tensors that are in the shards, first 'b'"),
        ({"a": "../m/s1.safetensors"}, "expected a file name in this directory"),
        ({"a": "/etc/passwd"}, "expected a file name in this directory"),
        ({"a": ".."}, "expected a file name in this directory"),
        ({"a": 1}, "expected weight_map"),
        ([], "expected weight_map"),
    ],
)
def test_a_lying_index_is_named(tmp_path: Path, weight_map: Any, expected: str) -> None:
    assert expected in error_of(sharded(tmp_path / "m", weight_map))


def test_safetensors_before_torch_and_one_file_before_shards(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m", {"a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"})
    (path / "pytorch_model.bin").write_bytes(b"stale")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors.keys() == {"a", "b", "c"}
    save_file({"d": np.zeros(1, np.float32)}, path / "model.safetensors")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors.keys() == {"d"}


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m", {"a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"})
    save_file({"a": np.zeros(2, np.float32), "c": np.zeros(4, np.float32)}, path / "s2.safetensors")
    assert "'a' is also in" in error_of(path)


def test_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    assert "no such file or directory" in error_of(tmp_path / "nothing")
    assert "expected model.safetensors" in error_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "no weights beside adapter_config.json" in error_of(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "expected a file" in error_of(tmp_path / "pipe.safetensors")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "no weights" in error_of(tmp_path)
    path = write(tmp_path / "m", {"a": np.zeros(1, np.float32)})
    (path / "config.json").write_text("{")
    assert "config.json: not JSON" in error_of(path)
    (path / "config.json").write_text("[]")
    assert "config.json: expected a JSON object" in error_of(path)


def test_what_may_not_be_read(tmp_path: Path) -> None:
    """Root may read anything: only an unprivileged process can be refused, in directories it may enter."""
    code = """
import os, sys
import lors.checkpoints.reader
from lors.errors import LorsError
if os.getuid() == 0:
    os.seteuid(65534)
for path in sys.argv[1:]:
    try:
        lors.checkpoints.reader.open_checkpoint(path)
    except LorsError as error:
        print(error)
"""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        closed = write(Path(name, "closed"), {"a": np.zeros(1, np.float32)})
        file = write(Path(name, "m"), {"a": np.zeros(1, np.float32)}) / "model.safetensors"
        file.chmod(0)
        closed.chmod(0)
        done = subprocess.run([sys.executable, "-c", code, file, closed], capture_output=True, text=True)
        closed.chmod(0o755)
    lines = done.stdout.splitlines()
    assert lines[0] == f"cannot read {file}: Permission denied", done.stderr
    assert lines[1].startswith(f"cannot read {closed}/") and lines[1].endswith(": Permission denied")


def test_sidecars_and_config(tmp_path: Path) -> None:
    path = write(tmp_path / "m", whisper(), {"model_type": "whisper"})
    for name in ("generation_config.json", "tokenizer.json", "trainer_state.json", "README.md", "optimizer.pt"):
        (path / name).write_text("{}")
    for source in (path, path / "model.safetensors"):
        with open_checkpoint(source) as checkpoint:
            assert checkpoint.config == {"model_type": "whisper"} and checkpoint.name == "m"
            assert [file.name for file in checkpoint.sidecars()] == [
                "config.json",
                "generation_config.json",
                "tokenizer.json",
            ]
            assert checkpoint.card() == path / "README.md"
    bare = tmp_path / "bare.safetensors"
    save_file({"a": np.zeros(1, np.float32)}, bare)
    with open_checkpoint(bare, name="mine") as checkpoint:
        assert (checkpoint.sidecars(), checkpoint.config, checkpoint.card(), checkpoint.name) == (
            [],
            None,
            None,
            "mine",
        )
