"""NeMo's archives: read where they lie, written again, refused where they lead elsewhere."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lors
from helpers import module
from lors import LorsError
from lors.checkpoints import layers
from lors.checkpoints.nemo import CONFIG, WEIGHTS
from lors.checkpoints.reader import open_checkpoint
from lors.experts.decompose import decompose
from lors.merging.edit import edit
from speech_models import saved
from weights import error_of

module("transformers", "transformers")

YAML = b"target: nemo.collections.asr.models.EncDecMultiTaskModel\nsample_rate: 16000\n"
State = dict[str, torch.Tensor]


def nemo_state(directory: Path, seed: int) -> State:
    """Weights of a tiny Cohere ASR, which transformers stores under NeMo's names, moved a little."""
    if not directory.exists():
        saved("cohere_asr", directory)
    generator = torch.Generator().manual_seed(seed)
    with open_checkpoint(directory) as checkpoint:
        state = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.tensors}
    noise = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in state.items()
        if value.is_floating_point()
    }
    return {name: value + 0.01 * noise[name] if name in noise else value for name, value in state.items()}


def archive(path: Path, state: State, options: dict[str, Any] | None = None) -> Path:
    """As NeMo saves it: files under "./", in the format that tarfile prefers."""
    stream = io.BytesIO()
    torch.save(state, stream)
    files = {CONFIG: YAML, WEIGHTS: stream.getvalue(), "0123abc_tokenizer.model": b"\x01\x02" * 300}
    with tarfile.open(path, "w:", **(options or {})) as tar:
        tar.addfile(entry("./", kind=tarfile.DIRTYPE))
        for name, content in files.items():
            tar.addfile(entry(f"./{name}", len(content)), io.BytesIO(content))
    return path


def entry(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.mtime = size, kind, 1.5  # a fraction of a second takes a record of its own
    return info


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_read_where_it_lies(form: int, tmp_path: Path) -> None:
    state = nemo_state(tmp_path / "model", 0)
    path = archive(tmp_path / "base.nemo", state, {"format": form})
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.naming, checkpoint.config, checkpoint.name) == ("nemo", None, "base")
        assert list(checkpoint.archive or {}) == [CONFIG, WEIGHTS, "0123abc_tokenizer.model"]
        assert checkpoint.tensors.keys() == state.keys()
        for name, value in state.items():
            assert checkpoint.read(name).tobytes() == value.numpy().tobytes()
        chosen = layers.select(checkpoint.tensors, checkpoint.naming, checkpoint.config)
    assert chosen.notice is None and chosen.rule == "nemo"
    with open_checkpoint(tmp_path / "model") as plain:
        assert chosen.names == layers.select(plain.tensors, plain.naming, plain.config).names


def test_merged_into_an_archive_again(tmp_path: Path) -> None:
    states = {name: nemo_state(tmp_path / "model", seed) for seed, name in enumerate(("base", "a", "b"))}
    paths = {name: archive(tmp_path / f"{name}.nemo", state) for name, state in states.items()}
    base = paths.pop("base")
    report = lors.merge(base, paths, tmp_path / "out", rank=2, lam=0.5, check=True)
    assert report.decomposed and any("reloaded" in line for line in report.notices)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.nemo",
        "README.md",
        "lors_recipe.yml",
        "lors_ledger.json",
    }
    plain = {name: {key: value.numpy() for key, value in state.items()} for name, state in states.items()}
    expected = lors.merge_state_dicts(plain.pop("base"), plain, rank=2, lam=0.5)
    with tarfile.open(tmp_path / "out" / "model.nemo", "r:") as tar:
        assert tar.getnames() == [CONFIG, WEIGHTS, "0123abc_tokenizer.model"]
        held = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    assert held[CONFIG] == YAML and held["0123abc_tokenizer.model"] == b"\x01\x02" * 300
    state = torch.load(io.BytesIO(held[WEIGHTS]), weights_only=True)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].numpy().tobytes() == value.tobytes(), name
    again = lors.merge(base, paths, tmp_path / "again", rank=2, lam=0.5)
    assert (tmp_path / "again" / "model.nemo").read_bytes() == (tmp_path / "out" / "model.nemo").read_bytes()
    assert again.bytes_written == report.bytes_written
    card = (tmp_path / "out" / "README.md").read_text()
    assert "automatic-speech-recognition" in card and "whisper" not in card.split("---")[1]
    lors.merge(base, paths, tmp_path / "out", force=True)  # is known for a model of ours


def test_an_archive_beside_a_model_has_a_configuration_of_its_own(tmp_path: Path) -> None:
    saved("cohere_asr", tmp_path / "hub")
    path = archive(tmp_path / "hub" / "model-v1.nemo", nemo_state(tmp_path / "hub", 1))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config is None and checkpoint.sidecars() == []


Change = Callable[[tarfile.TarFile], None]


def link(tar: tarfile.TarFile) -> None:
    info = entry("x", kind=tarfile.SYMTYPE)
    info.linkname = "/etc/passwd"
    tar.addfile(info)


def named(name: str, size: int = 0) -> Change:
    return lambda tar: tar.addfile(entry(name, size), io.BytesIO(bytes(size)))


def record(text: bytes, kind: bytes = tarfile.XHDTYPE) -> Change:
    return lambda tar: tar.addfile(entry("header", len(text), kind), io.BytesIO(text))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (link, "'x': expected files alone in the archive, got a link or a device"),
        (lambda tar: tar.addfile(entry("x", kind=tarfile.LNKTYPE)), "got a link or a device"),
        (lambda tar: tar.addfile(entry("x", kind=tarfile.CHRTYPE)), "got a link or a device"),
        (named("/etc/passwd"), "the archive has a file '/etc/passwd': expected a path inside of it"),
        (named("a/../../b"), "expected a path inside of it"),
        (named("a\x1b[31m"), "expected a path inside of it"),
        (named(f"./{WEIGHTS}"), f"the archive has the file '{WEIGHTS}' twice"),
        (record(b"x" * 70_000), "a header of 70000 bytes"),
        (record(b"12 path=/etc\n"), "damaged: expected records"),
        (record(b"999 path=/etc\n"), "damaged: expected records"),
        (record(b"13 path=/etc\n"), "expected a path inside of it"),
        (record(b"13 size=-100\n"), "'y': expected a size, got '-100'"),
        (record(b"20 size=99999999999\n"), "truncated: 'y' reaches over the end of the file"),
    ],
)  # fmt: skip
def test_hostile_archives(change: Change, said: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "x.nemo", {"a.weight": torch.zeros(2)})
    with tarfile.open(path, "a:", format=tarfile.USTAR_FORMAT) as tar:
        change(tar)
        tar.addfile(entry("y", 1), io.BytesIO(b"y"))
    error = error_of(path)
    assert said in error and error.startswith(str(path)) and "\n" not in error


@pytest.mark.parametrize("field", [slice(100, 108), slice(124, 136), slice(148, 156)])
def test_damaged_headers(field: slice, tmp_path: Path) -> None:
    data = bytearray(
        archive(tmp_path / "x.nemo", {"a.weight": torch.zeros(2)}, {"format": tarfile.USTAR_FORMAT}).read_bytes()
    )
    data[field] = b"9" * (field.stop - field.start)
    (tmp_path / "x.nemo").write_bytes(data)
    assert "not a tar file, or a damaged one: no header at byte 0" in error_of(tmp_path / "x.nemo")


def test_headers_without_end(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.nemo", "w:", format=tarfile.USTAR_FORMAT) as tar:
        for _ in range(20_001):
            tar.addfile(entry("d", kind=tarfile.DIRTYPE))
    assert "the archive has more than 20000 headers" in error_of(tmp_path / "x.nemo")


def test_what_is_no_archive_of_weights(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.nemo", "w:") as tar:
        tar.addfile(entry("model_weights/common.pt", 1), io.BytesIO(b"x"))
    assert "expected a NeMo archive with model_weights.ckpt, got model_weights/common.pt" in error_of(
        tmp_path / "x.nemo"
    )
    with tarfile.open(tmp_path / "gz.nemo", "w:gz") as tar:
        tar.addfile(entry(WEIGHTS, 1), io.BytesIO(b"x"))
    assert "this one is compressed: gunzip it first" in error_of(tmp_path / "gz.nemo")
    path = archive(tmp_path / "cut.nemo", {"a.weight": torch.zeros(2)})
    os.truncate(path, 5600)
    assert "truncated" in error_of(path)


def test_the_weights_may_not_run_code(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"x": np.float64(1)}, stream)
    with tarfile.open(tmp_path / "x.nemo", "w:") as tar:
        tar.addfile(entry(WEIGHTS, len(stream.getvalue())), io.BytesIO(stream.getvalue()))
    with pytest.raises(LorsError):
        open_checkpoint(tmp_path / "x.nemo")


def test_expert_files(tmp_path: Path) -> None:
    """Experts of an archive are decomposed, added and removed as others."""
    states = {name: nemo_state(tmp_path / "model", seed) for seed, name in enumerate(("base", "a", "b"))}
    paths = {name: archive(tmp_path / f"{name}.nemo", state) for name, state in states.items()}
    files = {name: tmp_path / f"{name}.lors.safetensors" for name in ("a", "b")}
    for name, file in files.items():
        decompose(paths["base"], paths[name], file, rank=2, remainder="float32", values="float32", name=name)
    lors.merge(paths["base"], {"a": files["a"]}, tmp_path / "out", rank=2, lam=0.5)
    before = weights_of(tmp_path / "out")
    edit(tmp_path / "out", files["b"])
    lors.merge(paths["base"], files, tmp_path / "both", rank=2, lam=0.5)
    for name, value in weights_of(tmp_path / "both").items():
        np.testing.assert_allclose(weights_of(tmp_path / "out")[name], value, rtol=1e-5, atol=1e-6)
    edit(tmp_path / "out", files["b"], remove=True)
    for name, value in weights_of(tmp_path / "out").items():
        np.testing.assert_allclose(value, before[name], rtol=1e-5, atol=1e-6)
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.nemo"]


def weights_of(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}
