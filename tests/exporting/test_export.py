"""`lors export`: what every target has in common: refusals, replacing, nothing half-written, values that do not fit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import lors
import tiny
import whispers
from lors.cli.app import application
from lors.errors import LorsError, SettingError
from lors.exporting import peer
from lors.exporting.export import TARGETS

OWN = ("ggml", "openai")  # written without anybody's converter


def copy(
    model: Path, target: Path, change: Callable[[dict[str, np.ndarray]], object] | None = None, **config: Any
) -> Path:
    return whispers.copy(model, target, change, **config)


def edited(model: Path, target: Path, name: str, change: Callable[[Any], Any]) -> Path:
    """A copy in which one JSON file went through `change`."""
    shutil.copytree(model, target)
    path = target / name
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    return target


def refused(call: Callable[[], object], root: Path) -> str:
    """The message of a refusal that left `root` as it was."""
    before = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    with pytest.raises(LorsError) as caught:
        call()
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize("to", OWN)
def test_the_report_and_the_command(to: str, model: Path, tmp_path: Path) -> None:
    report = lors.export(model, tmp_path / "a", to)
    assert (
        report.to == to
        and report.dtype == ("float16" if to == "ggml" else "float32")
        and bool(report.notices) == (to == "openai")
    )
    assert report.files == {path.name: path.stat().st_size for path in (tmp_path / "a").iterdir()}
    done = CliRunner().invoke(
        application(["export"]), ["export", str(model), "--to", to, "-o", str(tmp_path / "b"), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["files"] == report.files
    for name in report.files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() or to == "openai"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_what_is_there_is_replaced_if_it_is_an_export(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lors.export(model, out, "openai", dtype="float16")
    assert "--force replaces it" in refused(lambda: lors.export(model, out, "ggml"), tmp_path)
    lors.export(model, out, "ggml", dtype="float16", force=True)
    assert [path.name for path in out.iterdir()] == ["ggml-model.bin"]
    (out / "diary.txt").write_text("mine")
    assert "'diary.txt' is no part of one" in refused(lambda: lors.export(model, out, "openai", force=True), tmp_path)
    kept = tmp_path / "kept"
    shutil.copytree(model, kept)
    assert "is no part of one" in refused(lambda: lors.export(model, kept, "ggml", force=True), tmp_path)
    assert "replace the input" in refused(lambda: lors.export(kept, kept, "ggml", force=True), tmp_path)
    assert "inside the input" in refused(lambda: lors.export(kept, kept / "out", "ggml"), tmp_path)
    assert "of this machine" in refused(lambda: lors.export(kept, "s3://bucket/out", "ggml"), tmp_path)


@pytest.mark.parametrize("to", TARGETS)
def test_settings(to: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="to: unknown target 'gguf'; known: ctranslate2, ggml, onnx, openai"):
        lors.export(model, tmp_path / "out", "gguf")
    for dtype in ("bfloat16", "int4", {"openai": "int8", "ggml": "float32"}.get(to, "int2")):
        with pytest.raises(SettingError, match=f"dtype: expected float.* for {to}, got '{dtype}'"):
            lors.export(model, tmp_path / "out", to, dtype=dtype)
    arguments = ["export", str(model), "--to", to, "-o", str(tmp_path / "out"), "--dtype", "float8"]
    assert CliRunner().invoke(application(["export"]), arguments).exit_code
    assert not (tmp_path / "out").exists()


def without(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda state: {key: x for key, x in state.items() if key != name}


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda state: state | {name: change(state[name])}


FC1 = "model.encoder.layers.0.fc1.weight"
MODELS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "llama": (lambda m, t: copy(m, t, model_type="llama"), "expected a Whisper, got model_type 'llama'"),
    "no config": (lambda m, t: [copy(m, t), (t / "config.json").unlink()] and t, "expected config.json beside the weights"),
    "lacks": (lambda m, t: copy(m, t, without(FC1)), f"expected the tensors of a Whisper, it lacks 1: '{FC1}'"),
    "extra": (lambda m, t: copy(m, t, lambda s: s | {"new.weight": s[FC1]}), "has beyond it 1: 'new.weight'"),
    "shape": (lambda m, t: copy(m, t, changed(FC1, lambda x: x[:-1])), "of shape [512, 128], got F32 [511, 128]"),
    "float64": (lambda m, t: copy(m, t, changed(FC1, lambda x: x.astype(np.float64))), "got F64 [512, 128]"),
    "nan": (lambda m, t: copy(m, t, changed(FC1, lambda x: np.where(x == x.max(), np.nan, x))), "expected finite values, got nan"),
    "wide": (lambda m, t: copy(m, t, encoder_ffn_dim=500), "encoder_ffn_dim: expected 4 * d_model = 512"),
    "heads": (lambda m, t: copy(m, t, decoder_attention_heads=3), "expected a divisor of d_model = 128, got 3"),
    "layers": (lambda m, t: copy(m, t, decoder_layers=10**9), "decoder_layers: expected less than or equal to 1024"),
    "text": (lambda m, t: copy(m, t, d_model="128"), "config.json: d_model: expected an integer, got '128'"),
    "missing": (lambda m, t: edited(m, t, "config.json", lambda c: c.pop("vocab_size") and c), "config.json: vocab_size: missing"),
    "scaled": (lambda m, t: copy(m, t, scale_embedding=True), "scale_embedding false"),
    "relu": (lambda m, t: copy(m, t, activation_function="relu"), "expected activation_function gelu"),
    "head": (
        lambda m, t: copy(m, t, lambda s: s | {"proj_out.weight": s["model.decoder.embed_tokens.weight"] + 1}),
        "its output projection differs from its token embedding",
    ),
}  # fmt: skip


@pytest.mark.parametrize("to", OWN)
@pytest.mark.parametrize("case", MODELS)
def test_models_that_are_refused(case: str, to: str, model: Path, tmp_path: Path) -> None:
    make, message = MODELS[case]
    source = make(model, tmp_path / "in")
    assert message in refused(lambda: lors.export(source, tmp_path / "out", to), tmp_path)


@pytest.mark.parametrize("to", ("ctranslate2", "onnx"))
@pytest.mark.parametrize("case", [name for name in MODELS if name != "head"])
def test_models_that_are_refused_before_a_converter_sees_them(case: str, to: str, model: Path, tmp_path: Path) -> None:
    test_models_that_are_refused(case, to, model, tmp_path)


def test_values_beyond_the_type(model: Path, tmp_path: Path) -> None:
    source = copy(model, tmp_path / "in", changed(FC1, lambda x: np.where(x == x.max(), np.float32(1e5), x)))
    for to in OWN:
        message = refused(lambda to=to: lors.export(source, tmp_path / "out", to, dtype="float16"), tmp_path)
        assert f"tensor {FC1!r}: expected at most 65504 for float16, got 100000" in message
    lors.export(source, tmp_path / "out", "ggml", dtype="int8")
    beyond = copy(model, tmp_path / "beyond", changed(FC1, lambda x: np.where(x == x.max(), np.float32(1e8), x)))
    message = refused(lambda: lors.export(beyond, tmp_path / "out2", "ggml", dtype="int8"), tmp_path)
    assert "expected at most 8.31901e+06 for int8" in message


@pytest.mark.parametrize("to", OWN)
def test_vocabularies_that_the_programs_do_not_know(to: str, model: Path, tmp_path: Path) -> None:
    grown = copy(
        model, tmp_path / "grown", changed("model.decoder.embed_tokens.weight", lambda x: np.pad(x, ((0, 2), (0, 0)))),
        vocab_size=51867,
    )  # fmt: skip
    message = refused(lambda: lors.export(grown, tmp_path / "out", to), tmp_path)
    assert "knows vocabularies of 51864 (English-only), 51865" in message and message.endswith("got 51867")

    def moved(content: Any) -> Any:
        for token in content["added_tokens"]:
            token["id"] += {"<|transcribe|>": 1, "<|startoflm|>": -1}.get(token["content"], 0)
        return content

    source = edited(model, tmp_path / "moved", "tokenizer.json", moved)
    message = refused(lambda: lors.export(source, tmp_path / "out", to), tmp_path)
    assert "takes 50359 for <|transcribe|> in 51865 tokens, the tokenizer has 50360" in message


def test_ggml_needs_every_token(model: Path, tmp_path: Path) -> None:
    def dropped(content: Any) -> Any:
        del content["model"]["vocab"]["unused1000"]
        return content

    def spelt(content: Any) -> Any:
        content["model"]["vocab"] = {"日" if t == "unused1000" else t: n for t, n in content["model"]["vocab"].items()}
        return content

    for name, change, expected in (
        ("dropped", dropped, "expected a token for every id below 50257"),
        ("spelt", spelt, "expected the characters of byte-level BPE, got '日'"),
    ):
        source = edited(model, tmp_path / name, "tokenizer.json", change)
        assert expected in refused(lambda source=source: lors.export(source, tmp_path / "out", "ggml"), tmp_path)
    (tmp_path / "dropped" / "tokenizer.json").unlink()
    message = refused(lambda: lors.export(tmp_path / "dropped", tmp_path / "out", "ggml"), tmp_path)
    assert "expected tokenizer.json or vocab.json" in message


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bert"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "bert"}')
    save_file(
        {"bert.encoder.layer.0.attention.self.query.weight": np.zeros((2, 2), np.float32)}, path / "model.safetensors"
    )
    for to in TARGETS:
        assert "expected a Whisper, got model_type 'bert'" in refused(
            lambda to=to: lors.export(path, tmp_path / "out", to), tmp_path
        )
    part = tiny.write(tmp_path / "part", tiny.tensors(0, 0.5))
    assert "config.json: encoder_layers: missing" in refused(
        lambda: lors.export(part, tmp_path / "out", "openai"), tmp_path
    )


@pytest.mark.parametrize(("to", "module"), [("ctranslate2", "ctranslate2.converters"), ("onnx", "onnxscript")])
def test_a_missing_converter(
    to: str, module: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        if name == module:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return object()

    monkeypatch.setattr(peer, "import_module", missing)
    message = refused(lambda: lors.export(model, tmp_path / "out", to), tmp_path)
    assert message == f"--to {to}: needs {module.split('.')[0]}: pip install 'lors-merging[export]'"


@pytest.mark.parametrize("to", OWN)
def test_an_input_that_changes(to: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = copy(model, tmp_path / "in")
    from lors.exporting import model as reading

    slabs = reading.Whisper.slabs

    def touching(self: Any, *arguments: Any) -> Any:
        os.utime(source / "model.safetensors")
        return slabs(self, *arguments)

    monkeypatch.setattr(reading.Whisper, "slabs", touching)
    assert "while it was being read" in refused(lambda: lors.export(source, tmp_path / "out", to), tmp_path)


@pytest.mark.parametrize("naming", ["bfloat16", "float16", "openai"])
def test_what_the_model_is_stored_in(naming: str, model: Path, tmp_path: Path) -> None:
    """float16 stays; bfloat16 is float32, which holds every value; openai-whisper's .pt is a model like another."""
    if naming == "openai":
        first = lors.export(model, tmp_path / "in", "openai", dtype="float16")
        source, expected = tmp_path / "in" / "model.pt", "float16"
        assert first.dtype == "float16"
    else:
        source, expected = (
            copy(model, tmp_path / "in", whispers.cast(naming)),
            {"bfloat16": "float32"}.get(naming, naming),
        )
    report = lors.export(source, tmp_path / "out", "openai")
    assert report.dtype == expected
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["model_state_dict"]
    assert {str(x.dtype) for x in state.values()} == {f"torch.{expected}"}
    stored = load_file(model / "model.safetensors")[FC1]
    if naming == "bfloat16":
        stored = whispers.cast(naming)({"x": stored})["x"].astype(np.float32)
    np.testing.assert_array_equal(state["encoder.blocks.0.mlp.0.weight"].numpy(), stored.astype(expected))
