"""Torch archives: read without torch, refused where they would run code."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lors.checkpoints.reader import open_checkpoint
from lors.checkpoints.tensor_info import dtype_code
from weights import EMBEDDING, error_of, whisper


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
