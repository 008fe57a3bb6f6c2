"""Reading: every lie a weight file can tell is one clear line; what is true is read bit for bit."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from lors.checkpoints.compatibility import compare, dtype_kind
from lors.checkpoints.reader import open_checkpoint, sha256_checkpoints
from lors.checkpoints.tensor_info import DTYPES, dtype_code
from lors.errors import LorsError
from lors.files import digest

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EMBEDDING, HEAD = "model.decoder.embed_tokens.weight", "proj_out.weight"


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def whisper(
    d: int = 4, layers: int = 1, tokens: int = 20, mel: int = 8, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """A few tensors named and shaped as transformers' Whisper has them."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.encoder.conv1.weight": (d, mel, 3), EMBEDDING: (tokens, d)}
    for part in ("encoder", "decoder"):
        for layer in range(layers):
            shapes[f"model.{part}.layers.{layer}.self_attn.q_proj.weight"] = (d, d)
            shapes[f"model.{part}.layers.{layer}.self_attn.out_proj.weight"] = (d, d)
            shapes[f"model.{part}.layers.{layer}.fc1.weight"] = (4 * d, d)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write(path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None) -> Path:
    """A Hugging Face directory."""
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def error_of(source: Any) -> str:
    with pytest.raises(LorsError) as caught:
        open_checkpoint(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -------------------------------------------------------------------------------------------- lying headers


@pytest.mark.parametrize(
    ("header", "data", "expected"),
    [
        (b"[1]", b"", "JSON object"),
        (b'{"a": \xff}', b"", "not UTF-8"),
        (b'{"a": ', b"", "not JSON"),
        (b'{"a": NaN}', b"", "not JSON"),
        (b'{"a":' + b"[" * 200_000, b"", "not JSON"),
        (b'{"a": 1, "b": {"x": 1, "x": 2}}', b"", "'x' twice"),
        (b'{"a": 1, "a": 1}', b"", "'a' twice"),
        ({"a": [1]}, b"", "expected an object"),
        ({"a": {"dtype": "F32", "shape": []}}, b"", "dtype, shape and data_offsets"),
        ({"a": {**ENTRY, "extra": 1}}, b"", "dtype, shape and data_offsets"),
        ({"a": {**ENTRY, "dtype": "F31"}}, b"8 bytes.", "unknown dtype 'F31'"),
        ({"a": {**ENTRY, "dtype": 32}}, b"8 bytes.", "unknown dtype 32"),
        ({"a": {**ENTRY, "shape": [-2]}}, b"8 bytes.", "non-negative"),
        ({"a": {**ENTRY, "shape": [2.0]}}, b"8 bytes.", "whole numbers"),
        ({"a": {**ENTRY, "shape": [True, 2]}}, b"8 bytes.", "whole numbers"),
        ({"a": {**ENTRY, "shape": "2"}}, b"8 bytes.", "must be a list"),
        ({"a": {**ENTRY, "shape": [2**62, 4]}}, b"8 bytes.", "overflows"),
        ({"a": {**ENTRY, "shape": [2**64]}}, b"8 bytes.", "non-negative whole"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, b"8 bytes.", "two non-negative"),
        ({"a": {**ENTRY, "data_offsets": [0, -8]}}, b"8 bytes.", "two non-negative"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, b"8 bytes.", "takes 8 bytes"),
        ({"a": {**ENTRY, "shape": [3]}}, b"8 bytes.", "takes 12 bytes, data_offsets [0, 8] give 8"),
        ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, b"22", "whole bytes"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"x" * 12, "'b' overlaps 'a'"),
        ({"a": ENTRY, "b": ENTRY}, b"x" * 8, "overlaps"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, b"x" * 20, "'b' leaves a hole after 'a'"),
        ({"a": {**ENTRY, "data_offsets": [4, 12]}}, b"x" * 12, "hole after the header"),
        ({"a": ENTRY}, b"short", "truncated"),
        ({"a": ENTRY}, b"8 bytes and more", "8 bytes follow the last tensor"),
        ({"__metadata__": {"format": 1}, "a": ENTRY}, b"8 bytes.", "__metadata__"),
        ({}, b"", "no tensor"),
    ],
    ids=lambda value: None if isinstance(value, (dict, bytes)) else value,
)  # fmt: skip
def test_a_lying_header_is_named(tmp_path: Path, header: Any, data: bytes, expected: str) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, data)
    message = error_of(path)
    assert expected in message and str(path) in message


def test_lengths_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"1234567")
    assert "at least 8 bytes, got 7" in error_of(path)
    assert "limit" in error_of(raw_file(path, {"a": ENTRY}, b"8 bytes.", length=100_000_001))
    assert "limit" in error_of(raw_file(path, {"a": ENTRY}, b"8 bytes.", length=2**64 - 1))
    assert "truncated: the header takes 9999" in error_of(raw_file(path, {"a": ENTRY}, b"8 bytes.", length=9999))


def test_names_cannot_break_the_line(tmp_path: Path) -> None:
    directory = tmp_path / "new\nline"
    directory.mkdir()
    assert "new\\nline" in error_of(raw_file(directory / "x.safetensors", {"a\nb\u2028": {**ENTRY, "dtype": "X"}}))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_damage_is_an_error_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """What we accept, the safetensors package accepts, with the same contents; nothing but LorsError comes out."""
    sound = save(
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), np.int8), "c": np.array(1.5)}
    )
    blob = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(
            st.sampled_from(b'0129-{}[]",: \x00\xff') | st.integers(0, 255)
        )
    blob = blob[: data.draw(st.sampled_from([len(blob), len(blob) - 1, data.draw(st.integers(0, len(blob)))]))]
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(blob)
    try:
        with open_checkpoint(path) as checkpoint:
            ours = {name: (info.shape, checkpoint.read(name).tobytes()) for name, info in checkpoint.tensors.items()}
    except LorsError:
        return
    theirs = {name: (tuple(v["shape"]), bytes(v["data"])) for name, v in safetensors.deserialize(bytes(blob))}
    assert ours == theirs


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


# ------------------------------------------------------------------------------------------- torch archives


@pytest.fixture(scope="module")
def torch() -> Any:
    import torch

    return torch


def test_openai_whisper_pt(tmp_path: Path, torch: Any) -> None:
    shared = torch.arange(12, dtype=torch.float32)
    state = torch.nn.Linear(3, 2).state_dict()  # carries _metadata, which the pickle sets on the dictionary
    state.update(
        {
            "encoder.conv1.weight": torch.randn(4, 8, 3).half(),
            "decoder.blocks.0.attn.query.weight": torch.randn(4, 4).bfloat16(),
            "view": shared[4:10].view(2, 3),
            "parameter": torch.nn.Parameter(torch.randn(2)),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(7),
            "f8": torch.ones(3).to(torch.float8_e4m3fn),
            "u16": torch.ones(3, dtype=torch.uint16),
            "one row, odd strides": torch.randn(8, 5).t()[:1, :1],
        }
    )
    path = tmp_path / "small.pt"
    torch.save({"dims": {"n_mels": 80}, "model_state_dict": state}, path)
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.naming, checkpoint.dims, checkpoint.config) == ("openai-whisper", {"n_mels": 80}, None)
        assert checkpoint.tensors.keys() == state.keys() and checkpoint.name == "small"
        for name, tensor in state.items():
            got = checkpoint.read(name)
            assert got.shape == tuple(tensor.shape) and dtype_code(got.dtype) == checkpoint.tensors[name].code
            expected = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
            assert got.tobytes() == (expected.view(torch.uint8).numpy().tobytes() if expected.numel() else b"")
        assert checkpoint.sha256() == {"small.pt": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_pytorch_model_bin(tmp_path: Path, torch: Any) -> None:
    torch.save({name: torch.from_numpy(value) for name, value in whisper().items()}, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.naming == "hf-whisper" and checkpoint.dims is None
        assert checkpoint.read(EMBEDDING).tobytes() == whisper()[EMBEDDING].tobytes()


def test_sharded_pytorch_model_bin(tmp_path: Path, torch: Any) -> None:
    state = {name: torch.from_numpy(value) for name, value in whisper().items()}
    half = len(state) // 2
    files = {name: f"pytorch_model-0000{1 + (i >= half)}-of-00002.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: value for name, value in state.items() if files[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert len(checkpoint.files) == 2 and checkpoint.tensors.keys() == state.keys()
        assert all(checkpoint.read(name).tobytes() == value.numpy().tobytes() for name, value in state.items())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_of_torch(tmp_path: Path, torch: Any, protocol: int) -> None:
    """Tied weights and views share a storage; more than 256 names fill the short form of the memo."""
    tied = torch.randn(6, 4)
    state: dict[str, Any] = {"embed": tied, "head": tied, "view": tied[2:4]}
    state |= {f"layers.{i}.weight": torch.full((3,), float(i)).bfloat16() for i in range(300)}
    torch.save(state, tmp_path / "x.pt", pickle_protocol=protocol)
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
        for name, value in state.items():
            assert checkpoint.read(name).astype(np.float32).tolist() == value.float().tolist()
        assert checkpoint.info("embed").offset == checkpoint.info("head").offset


class Attack:
    """A pickle that, loaded without care, makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_needs_code_is_refused(tmp_path: Path, torch: Any) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model_state_dict": {"a": torch.zeros(1)}, "hook": Attack(tmp_path / "owned")}, path)
    message = error_of(path)
    assert "refused: its pickle asks for posix.mkdir" in message or "nt.mkdir" in message
    assert not (tmp_path / "owned").exists()
    torch.save({"model_state_dict": {"a": torch.zeros(1)}, "args": argparse.Namespace(lr=1)}, path)
    assert "asks for argparse.Namespace" in error_of(path)


def test_damaged_torch_archives(tmp_path: Path, torch: Any) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.randn(8, 5).t()}, path)
    assert "'a': not contiguous" in error_of(path)
    torch.save({"a": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    assert "before 1.6" in error_of(path)
    torch.save({"a": 3}, path)
    assert "state dict of tensors, got int under 'a'" in error_of(path)
    torch.save([torch.zeros(3)], path)
    assert "expected a state dict" in error_of(path)
    torch.save({"a": torch.zeros(1000)}, path)
    sound = path.read_bytes()
    path.write_bytes(sound[:2000])
    assert "damaged" in error_of(path)
    path.write_bytes(sound.replace(b"FloatStorage", b"HloatStorage"))
    assert "x.pt" in error_of(path)


def rezip(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> None:
    """Writes a torch archive again, each member's content changed by `change(name, content)` (None drops it)."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            if (changed := change(name.partition("/")[2], content)) is not None:
                archive.writestr(name, changed)


def test_lying_torch_archives(tmp_path: Path, torch: Any) -> None:
    path = tmp_path / "x.pt"

    def refused(change: Any, compression: int = zipfile.ZIP_STORED) -> str:
        torch.save({"a": torch.zeros(1000)}, path)
        rezip(path, change, compression)
        return error_of(path)

    assert "is compressed" in refused(lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert "no data.pkl" in refused(lambda name, content: None if name == "data.pkl" else content)
    assert "data/0) are not in the archive" in refused(lambda name, content: None if name == "data/0" else content)
    assert "which has 3996" in refused(lambda name, content: content[:-4] if name == "data/0" else content)
    assert "byte order" in refused(lambda name, content: b"big" if name == "byteorder" else content)
    assert "cannot be read" in refused(lambda name, content: content[:50] if name == "data.pkl" else content)
    assert "cannot be read" in refused(lambda name, content: b"\x80\x02J" if name == "data.pkl" else content)


def test_pt_is_read_without_torch(tmp_path: Path, torch: Any) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    code = f"""
import sys
from lors.checkpoints.reader import open_checkpoint
assert open_checkpoint({str(tmp_path / "x.pt")!r}).read("a").tolist() == [1, 1, 1]
assert "torch" not in sys.modules and "huggingface_hub" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------------------------------------- compare


def differ(
    tmp_path: Path, base: dict[str, np.ndarray], expert: dict[str, np.ndarray], config: dict[str, Any] | None = None
) -> str | None:
    """The message of compare, None when they fit."""
    number = len(list(tmp_path.iterdir()))
    ours = write(tmp_path / f"base{number}", base)
    theirs = write(tmp_path / f"expert{number}", expert, config)
    with open_checkpoint(ours, name="BASE") as first, open_checkpoint(theirs, name="EXPERT") as second:
        try:
            compare(first, second)
        except LorsError as error:
            assert "\n" not in str(error)
            return str(error)
    return None


def test_equal_architectures_fit(tmp_path: Path) -> None:
    assert differ(tmp_path, whisper(), whisper()) is None
    assert differ(tmp_path, whisper(), whisper(dtype=np.float16)) is None
    assert (
        differ(tmp_path, {**whisper(), "steps": np.ones(1, np.int64)}, {**whisper(), "steps": np.ones(1, np.int32)})
        is None
    )


def test_known_differences_are_named(tmp_path: Path) -> None:
    def message(**expert: int) -> str:
        return str(differ(tmp_path, whisper(2, 2, 51865, 80, np.float16), whisper(**{"d": 2, "layers": 2, **expert})))

    vocabulary = message(tokens=51866, mel=80)
    assert "EXPERT: another vocabulary: expected 51865 (multilingual, up to large-v2) tokens as in BASE" in vocabulary
    assert "got 51866 (large-v3 and turbo)" in vocabulary
    assert "got 51864 (English-only)" in message(tokens=51864, mel=80)
    assert "expected 80 mel bins as in BASE, got 128" in message(tokens=51865, mel=128)
    assert "another model size: expected d_model 2 as in BASE, got 768 (small)" in message(d=768)
    assert "another depth: expected 2 encoder layers as in BASE, got 3" in message(tokens=51865, mel=80, layers=3)
    odd = whisper()
    odd["model.encoder.layers.0.fc1.weight"] = np.zeros((8, 4), np.float32)
    assert "'model.encoder.layers.0.fc1.weight': expected shape [16, 4] as in BASE, got [8, 4]" in str(
        differ(tmp_path, whisper(), odd)
    )


def test_missing_and_extra_tensors_are_counted(tmp_path: Path) -> None:
    base = {**whisper(), **{f"bias.{i}": np.zeros(1, np.float32) for i in range(5)}}
    message = str(differ(tmp_path, base, {**whisper(), "more": np.zeros(1, np.float32)}))
    assert "it lacks 5 tensors 'bias.0', 'bias.1', 'bias.2' and 2 more and has the extra 1 tensor 'more'" in message


def test_namings(tmp_path: Path) -> None:
    names = {
        "model.": "",
        "layers.": "blocks.",
        "self_attn.q_proj": "attn.query",
        "self_attn.out_proj": "attn.out",
        "embed_tokens": "token_embedding",
    }
    openai = {}
    for name, value in whisper().items():
        for old, new in names.items():
            name = name.replace(old, new)
        openai[name] = value
    assert "named as in openai-whisper, those of BASE as in hf-whisper" in str(differ(tmp_path, whisper(), openai))
    bare = {name.removeprefix("model."): value for name, value in whisper().items()}
    assert "lack the prefix 'model.'" in str(differ(tmp_path, whisper(), bare))
    assert "no tensor has the name" in str(differ(tmp_path, whisper(), {"x": np.zeros(1, np.float32)}))


def test_dtypes(tmp_path: Path) -> None:
    def with_query(dtype: Any) -> dict[str, np.ndarray]:
        tensors = whisper()
        name = "model.encoder.layers.0.self_attn.q_proj.weight"
        return {**tensors, name: tensors[name].astype(dtype)}

    assert "expected F32 (float) as in BASE, got I8 (integer)" in str(differ(tmp_path, whisper(), with_query(np.int8)))
    assert "BASE: tensor" in str(differ(tmp_path, with_query(np.complex64), whisper()))
    message = str(differ(tmp_path, whisper(), with_query(np.complex64)))
    assert "EXPERT: tensor 'model.encoder.layers.0.self_attn.q_proj.weight': C64 cannot be merged" in message


def test_tied_head(tmp_path: Path) -> None:
    tied, other = {**whisper(), HEAD: whisper()[EMBEDDING].copy()}, {**whisper(), HEAD: whisper()[EMBEDDING] + 1}
    assert differ(tmp_path, whisper(), tied) is None
    assert differ(tmp_path, tied, whisper()) is None
    assert differ(tmp_path, tied, tied) is None
    assert "differs from its token embedding" in str(differ(tmp_path, whisper(), other))
    assert "lacks 1 tensor 'proj_out.weight'" in str(
        differ(tmp_path, tied, whisper(), config={"tie_word_embeddings": False})
    )
    nearly = {**whisper(), HEAD: whisper()[EMBEDDING].copy()}
    nearly[HEAD][-1, -1] = np.nextafter(nearly[HEAD][-1, -1], np.float32(9))
    for index, (tensors, stored, is_tied) in enumerate(
        [(whisper(), EMBEDDING, True), (tied, HEAD, True), (other, HEAD, False), (nearly, HEAD, False)]
    ):
        with open_checkpoint(write(tmp_path / f"one{index}", tensors)) as checkpoint:
            assert (checkpoint.resolve(HEAD), checkpoint.head_is_tied) == (stored, is_tied)
            assert checkpoint.resolve("nothing") is None


# -------------------------------------------------------------------------------------------------- digests


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LORS_DIGEST_CACHE", raising=False)
    monkeypatch.setattr(digest, "_SETTLED_NS", -(10**12))  # the files of a test are always fresh
    return tmp_path / "cache" / "lors" / "digests"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(os.urandom(3_000_001))
    assert digest.sha256_file(path) == sha256(path)
    (entry,) = cache.iterdir()
    entry.write_text("a" * 64)
    assert digest.sha256_file(path) == "a" * 64, "the remembered value is used"
    for damaged in (b"", b"\xff\xfe", b"A" * 64, b"a" * 63):
        entry.write_bytes(damaged)
        assert digest.sha256_file(path) == sha256(path)
        assert entry.read_text().strip() == sha256(path), "a damaged entry is written anew"
    entry.write_text("a" * 64)
    times = path.stat()
    path.write_bytes(os.urandom(3_000_001))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest.sha256_file(path) == sha256(path), "same size and mtime, but ctime tells"


def test_cache_off_unwritable_or_file_fresh(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"weights")
    monkeypatch.setattr(digest, "_SETTLED_NS", 2_000_000_000)
    assert digest.sha256_file(path) == sha256(path) and not cache.exists(), (
        "a fresh file may change under the same times"
    )
    monkeypatch.setattr(digest, "_SETTLED_NS", -(10**12))
    monkeypatch.setenv("LORS_DIGEST_CACHE", "0")
    assert digest.sha256_file(path) == sha256(path) and not cache.exists()
    monkeypatch.delenv("LORS_DIGEST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert digest.sha256_file(path) == sha256(path)


def test_several_files_at_once(tmp_path: Path, cache: Path) -> None:
    paths = [write(tmp_path / name, {name: np.zeros(1000 + ord(name), np.float32)}) for name in "abc"]
    checkpoints = [open_checkpoint(path) for path in paths]
    expected = [{"model.safetensors": sha256(path / "model.safetensors")} for path in paths]
    assert sha256_checkpoints(checkpoints, threads=2) == expected == [one.sha256() for one in checkpoints]
    (paths[1] / "model.safetensors").unlink()
    with pytest.raises(LorsError, match="cannot read .*b/model.safetensors"):
        sha256_checkpoints(checkpoints)
    for one in checkpoints:
        one.close()


def test_an_error_stops_the_other_hashes(tmp_path: Path, cache: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as stream:
        stream.truncate(1 << 40)  # sparse: hashing it would take ten minutes
    for paths in ([tmp_path / "missing", big], [big, tmp_path / "missing"]):
        with pytest.raises(LorsError, match="missing"):
            digest.sha256_files(paths, threads=2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lors-sha256")]


@pytest.mark.parametrize("home", ["blobs", "hub/models--org--whisper/blobs"])
def test_a_name_is_no_digest(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    """Blobs of the hub's cache are named by their SHA-256: until one is damaged, or somebody makes such a name."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    blob = tmp_path / home / ("0" * 64)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"not that digest")
    (tmp_path / "link").symlink_to(blob)
    assert digest.sha256_file(tmp_path / "link") == digest.sha256_file(blob) == sha256(blob)


# ------------------------------------------------------------------------------------------------------ hub


def test_hub_ids_offline(tmp_path: Path) -> None:
    """A real hub cache, without a network: what is in it opens, what is not is one line."""
    commit = "1" * 40
    repository = tmp_path / "hub" / "models--org--whisper"
    snapshot = write(repository / "snapshots" / commit, whisper(), {"model_type": "whisper"})
    (repository / "blobs").mkdir()
    blob = repository / "blobs" / sha256(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = f"""
from lors.checkpoints.reader import open_checkpoint
from lors.errors import LorsError
for source in ("org/whisper", "org/whisper@{commit}"):
    with open_checkpoint(source) as checkpoint:
        assert (checkpoint.hub_id, checkpoint.name, checkpoint.naming) == ("org/whisper", source, "hf-whisper")
        assert checkpoint.sha256() == {{"model.safetensors": {blob.name!r}}}
for source in ("org/other", "org/whisper@v2"):
    try:
        open_checkpoint(source)
    except LorsError as error:
        assert str(error).startswith(source) and "cannot be reached" in str(error), error
    else:
        raise AssertionError(source)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
