"""Headers of safetensors files that lie, and damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from lors.checkpoints.reader import open_checkpoint
from lors.errors import LorsError
from weights import error_of, raw_file

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


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
