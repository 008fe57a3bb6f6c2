"""Weights streamed into files."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from lors.checkpoints.reader import open_checkpoint
from lors.checkpoints.tensor_info import DTYPES
from lors.checkpoints.writer import TorchWriter, WeightWriter
from lors.errors import LorsError
from writers import names

F32 = np.dtype(np.float32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    specs=st.lists(
        st.tuples(
            st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3"]),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        min_size=1,
        max_size=8,
    ),
    shard_bytes=st.sampled_from([1, 64, 10**9]),
    metadata=st.sampled_from([None, {}, {"format": "pt", "naïve": "ключ"}]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, specs: Any, shard_bytes: int, metadata: Any, seed: int
) -> None:
    """Random tensors in random pieces: read back by the safetensors package and by ours, aligned, every bit equal."""
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("round")
    tensors: dict[str, np.ndarray] = {}
    for index, (code, shape) in enumerate(specs):
        size = int(np.prod(shape)) * DTYPES[code].itemsize
        content = rng.integers(0, 2 if code == "BOOL" else 256, size, dtype=np.uint8)
        tensors[f"t.{index} “"] = content.view(DTYPES[code]).reshape(shape)
    with WeightWriter(
        path,
        [(name, value.dtype, value.shape) for name, value in tensors.items()],
        shard_bytes=shard_bytes,
        metadata=metadata,
    ) as writer:
        pieces = []
        for name, value in tensors.items():
            cuts = sorted({0, value.size, *rng.integers(0, value.size + 1, 3).tolist()})
            pieces += [(name, start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]
        for name, start, stop in rng.permutation(np.array(pieces, dtype=object)) if pieces else []:
            writer.write(str(name), tensors[str(name)].reshape(-1)[start:stop], start)
        written = writer.finish()
    assert sorted(names(path)) == sorted(file.name for file in written)
    files = [file for file in written if file.suffix == ".safetensors"]
    theirs = [entry for file in files for entry in safetensors.deserialize(file.read_bytes())]
    assert {name: (tuple(v["shape"]), bytes(v["data"])) for name, v in theirs} == {
        name: (value.shape, value.tobytes()) for name, value in tensors.items()
    }
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == ({"format": "pt"} if metadata is None else metadata)
        for name, value in tensors.items():
            assert checkpoint.tensors[name].offset % value.dtype.itemsize == 0
            assert checkpoint.read(name).tobytes() == value.tobytes() and checkpoint.read(name).dtype == value.dtype


def test_shards_and_index_as_transformers_has_them(tmp_path: Path) -> None:
    specs = [("a", F32, (100,)), ("b", F32, (10,)), ("c", np.dtype(np.float16), (10,)), ("d", F32, (5,))]
    with WeightWriter(tmp_path, specs, shard_bytes=60) as writer:
        for name, dtype, shape in specs:
            writer.write(name, np.zeros(shape, dtype))
        writer.finish()
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names(tmp_path) == sorted([*files, "model.safetensors.index.json"])
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_parameters": 125, "total_size": 480},
        "weight_map": {"a": files[0], "b": files[1], "c": files[1], "d": files[2]},
    }


def test_writes_from_many_threads(tmp_path: Path) -> None:
    specs = [(f"t{i}", F32, (64, 1000)) for i in range(4)]
    pieces = [(name, start) for name, _, _ in specs for start in range(0, 64_000, 500)]
    with WeightWriter(tmp_path, specs, shard_bytes=300_000) as writer:
        with ThreadPoolExecutor(8) as pool:
            done = pool.map(lambda p: writer.write(p[0], np.arange(p[1], p[1] + 500, dtype=np.float32), p[1]), pieces)
            assert len(list(done)) == len(pieces)
        writer.finish()
    with open_checkpoint(tmp_path) as checkpoint:
        for name, _, _ in specs:
            np.testing.assert_array_equal(checkpoint.read(name).reshape(-1), np.arange(64_000, dtype=np.float32))


def test_holes_and_double_writes_are_bugs_that_show(tmp_path: Path) -> None:
    specs = [("a", F32, (4, 2)), ("b", F32, (1,))]
    with WeightWriter(tmp_path, specs) as writer:
        writer.write("b", np.zeros(1, np.float32))
        writer.write("a", np.zeros(4, np.float32), 0)
        with pytest.raises(RuntimeError, match=r"1 tensors are not completely written, first 'a' \(4 elements\)"):
            writer.finish()
        for array, start, message in [
            (np.zeros(4, np.float32), 3, "written twice"),
            (np.zeros(5, np.float32), 4, "not within"),
            (np.zeros(1, np.float32), -1, "not within"),
            (np.zeros(4, np.float64), 4, "declared as float32, got float64"),
        ]:
            with pytest.raises(ValueError, match=message):
                writer.write("a", array, start)
        writer.write("a", np.arange(8, dtype=np.float32)[::2], 4)  # not contiguous
        writer.finish()
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("a").reshape(-1).tolist() == [0, 0, 0, 0, 0, 2, 4, 6]
    for names_ in (["x", "x"], ["__metadata__"]):
        with pytest.raises(ValueError, match="names must be unique"):
            WeightWriter(tmp_path, [(name, F32, ()) for name in names_])
    with pytest.raises(LorsError, match="File exists"):
        WeightWriter(tmp_path, specs)


def test_openai_pt_round_trip(tmp_path: Path) -> None:
    import torch

    codes = ["F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL"]
    tensors = {code: np.arange(6).reshape(2, 3).astype(DTYPES[code]) for code in codes}
    with TorchWriter(tmp_path / "x.pt", [(n, v.dtype, v.shape) for n, v in tensors.items()], {"n_mels": 80}) as writer:
        for name, value in tensors.items():
            writer.write(name, value.reshape(-1)[2:], 2)
            if name == "F32":
                with pytest.raises(RuntimeError, match="6 tensors"):
                    writer.finish()
            writer.write(name, value.reshape(-1)[:2])
        assert writer.finish() == [tmp_path / "x.pt"]
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert loaded["dims"] == {"n_mels": 80}
    assert loaded["model_state_dict"]["BF16"].dtype == torch.bfloat16
    for name, value in tensors.items():
        assert loaded["model_state_dict"][name].double().tolist() == value.astype(float).tolist()
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert all(checkpoint.read(name).tobytes() == value.tobytes() for name, value in tensors.items())
