"""transformers: a live merged model equals the one that is written and loaded; and models that are no Whisper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lors
from lors import LorsError
from lors.integrations.transformers import load_merged


def test_the_live_model_is_the_written_one(tiny_whisper: Path, tmp_path: Path) -> None:
    experts = {name: tiny_whisper / name for name in ("ca", "de")}
    model = load_merged(tiny_whisper / "base", experts, rank=3, density=0.1, lam=0.7)
    lors.merge(tiny_whisper / "base", experts, tmp_path / "out", rank=3, density=0.1, lam=0.7, durable=False)
    written = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert type(model) is type(written) and not model.training
    for name, tensor in written.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.generation_config.to_dict() == written.generation_config.to_dict()
    half = load_merged(tiny_whisper / "base", experts, "task_arithmetic", out_dtype="float16")
    assert half.dtype == torch.float16


def test_bad_arguments(tiny_whisper: Path) -> None:
    experts = {"ca": tiny_whisper / "ca"}
    for arguments, message in (
        ({"experts": {}}, "expected at least one model"),
        ({"experts": experts, "rnak": 3}, "unknown parameter 'rnak' of method lors, did you mean 'rank'"),
        ({"experts": experts, "method": "tise"}, "unknown method 'tise', did you mean 'ties'"),
        (
            {"experts": experts, "model_class": "Whisper"},
            "model_class: expected a class of transformers, got 'Whisper'",
        ),
        ({"experts": {"ca": tiny_whisper / "nowhere"}}, "nowhere: no such file or directory"),
    ):
        with pytest.raises(LorsError, match=message):
            load_merged(tiny_whisper / "base", **arguments)  # type: ignore[arg-type]


def test_a_class_that_is_not_there(tiny_whisper: Path, tmp_path: Path) -> None:
    import whispers

    odd = whispers.copy(tiny_whisper / "base", tmp_path / "odd", architectures=["NoSuchModel"])
    with pytest.raises(LorsError, match="expected a class of transformers under architectures"):
        load_merged(odd, {"ca": tiny_whisper / "ca"})
    bare = tiny_whisper / "base" / "model.safetensors"
    (tmp_path / "bare.safetensors").write_bytes(bare.read_bytes())
    with pytest.raises(LorsError, match=r"expected a config.json beside the weights"):
        load_merged(tmp_path / "bare.safetensors", {"ca": tiny_whisper / "ca"})


@pytest.mark.parametrize("kind", ["whisper", "evil"])
def test_code_that_comes_with_a_model_is_never_run(tiny_whisper: Path, tmp_path: Path, kind: str) -> None:
    """`auto_map` names a module in the model's directory; to import it is to run it."""
    import json

    import whispers
    from lors.speech.model.whisper import load_model, load_processor

    names = ("AutoConfig", "AutoModelForSpeechSeq2Seq", "AutoTokenizer", "AutoProcessor", "AutoFeatureExtractor")
    code = {
        "auto_map": {name: ["evil.Thing", "evil.Thing"] if name == "AutoTokenizer" else "evil.Thing" for name in names}
    }
    odd = whispers.copy(tiny_whisper / "base", tmp_path / "odd", model_type=kind, **code)
    for name in (
        "tokenizer_config.json",
        "processor_config.json",
        "preprocessor_config.json",
        "generation_config.json",
    ):
        content = json.loads((odd / name).read_text()) if (odd / name).exists() else {}
        (odd / name).write_text(json.dumps(content | code))
    (odd / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Thing: pass\n")
    loads = (load_model, load_processor, lambda model: load_merged(model, {"x": tiny_whisper / "ca"}, rank=2))
    for load in loads:
        try:
            load(odd)
        except LorsError as error:
            assert "\n" not in str(error)
    assert not (tmp_path / "owned").exists()
    out = tmp_path / "out"
    lors.merge(odd, {"x": tiny_whisper / "ca"}, out, rank=2)
    assert not (out / "evil.py").exists() and not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "names", [["pipeline"], ["AutoModel"], ["logging"], [3], "WhisperForConditionalGeneration", [[]], {"a": 1}]
)
def test_what_a_configuration_names_is_a_model_of_transformers(tiny_whisper: Path, tmp_path: Path, names: Any) -> None:
    import whispers

    odd = whispers.copy(tiny_whisper / "base", tmp_path / "odd", architectures=names)
    with pytest.raises(LorsError, match="architectures"):
        load_merged(odd, {"ca": tiny_whisper / "ca"})


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "T5ForConditionalGeneration": ("T5Config", {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 50}),
    "LlamaForCausalLM": (
        "LlamaConfig",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50},
    ),
    "Wav2Vec2ForCTC": (
        "Wav2Vec2Config",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
        | {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16}
        | {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", ["lors", "ties", "tsv"])
def test_models_that_are_no_whisper(method: str, name: str, tmp_path: Path) -> None:
    config_name, values = CONFIGS[name]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(getattr(transformers, config_name)(**values))
    model.save_pretrained(tmp_path / "base")
    for label in ("x", "y"):
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / label)
    report = lors.merge(
        tmp_path / "base", {"x": tmp_path / "x", "y": tmp_path / "y"}, tmp_path / "out", method, check=True, durable=False,
        **({"density": 0.3} if method != "tsv" else {}),
    )  # fmt: skip
    merged = model_class.from_pretrained(tmp_path / "out")
    base = model_class.from_pretrained(tmp_path / "base").state_dict()
    assert any(not torch.equal(tensor, base[key]) for key, tensor in merged.state_dict().items())
    # attention and MLP of both stacks, by the table, without a notice that anything was guessed
    projections = {
        "T5ForConditionalGeneration": 2 * (4 + 2) + 2 * (8 + 2),
        "LlamaForCausalLM": 2 * 7,
        "Wav2Vec2ForCTC": 2 * 6,
    }
    assert report.decomposed == (0 if method == "ties" else projections[name])
    assert not any("no rule" in notice for notice in report.notices)
    ids = torch.zeros(1, 400) if "Wav2Vec2" in name else torch.ones(1, 4, dtype=torch.long)
    inputs = {"input_values": ids} if "Wav2Vec2" in name else {"input_ids": ids}
    if "T5" in name:
        inputs["decoder_input_ids"] = ids
    assert torch.isfinite(merged(**inputs).logits).all()
