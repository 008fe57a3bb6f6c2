"""Which tensors are decomposed, what they are called in tables, how deep they sit."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from lors.checkpoints import layers
from lors.errors import LorsError
from lors.recipes.entries import Target


def whisper(d_model: int, encoder_layers: int, decoder_layers: int, mels: int = 80) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Hugging Face Whisper; nothing is allocated."""
    config = transformers.WhisperConfig(
        d_model=d_model,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_ffn_dim=4 * d_model,
        decoder_ffn_dim=4 * d_model,
        encoder_attention_heads=d_model // 64,
        decoder_attention_heads=d_model // 64,
        num_mel_bins=mels,
    )
    with torch.device("meta"):
        model = transformers.WhisperForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


OPENAI = (
    (r"^model\.", ""),
    (r"\.layers\.(\d+)\.self_attn_layer_norm", r".blocks.\1.attn_ln"),
    (r"\.layers\.(\d+)\.encoder_attn_layer_norm", r".blocks.\1.cross_attn_ln"),
    (r"\.layers\.(\d+)\.final_layer_norm", r".blocks.\1.mlp_ln"),
    (r"\.layers\.(\d+)\.self_attn", r".blocks.\1.attn"),
    (r"\.layers\.(\d+)\.encoder_attn", r".blocks.\1.cross_attn"),
    (r"\.layers\.(\d+)\.fc1", r".blocks.\1.mlp.0"),
    (r"\.layers\.(\d+)\.fc2", r".blocks.\1.mlp.2"),
    (r"\.q_proj", ".query"),
    (r"\.k_proj", ".key"),
    (r"\.v_proj", ".value"),
    (r"\.out_proj", ".out"),
    (r"^encoder\.layer_norm", "encoder.ln_post"),
    (r"^decoder\.layer_norm", "decoder.ln"),
    (r"embed_tokens", "token_embedding"),
    (r"embed_positions\.weight", "positional_embedding"),
)


def openai_name(name: str) -> str:
    for pattern, replacement in OPENAI:
        name = re.sub(pattern, replacement, name)
    return name


SIZES = {
    "tiny": ((384, 4, 4), 64),
    "base": ((512, 6, 6), 96),
    "small": ((768, 12, 12), 192),
    "medium": ((1024, 24, 24), 384),
    "large-v3": ((1280, 32, 32, 128), 512),
    "turbo": ((1280, 32, 4, 128), 232),
}


@pytest.mark.parametrize("size", SIZES)
def test_whisper_has_the_known_number_of_matrices_in_both_namings(size: str) -> None:
    arguments, count = SIZES[size]
    hf = whisper(*arguments)
    chosen = layers.select(hf)
    assert layers.naming(hf) == chosen.rule == "hf-whisper"
    assert chosen.notice is None
    assert len(chosen.names) == count

    openai = {openai_name(name): shape for name, shape in hf.items() if name != "proj_out.weight"}
    assert layers.naming(openai) == "openai-whisper"
    assert layers.decomposed(openai) == {openai_name(name) for name in chosen.names}


def test_whisper_small_has_the_known_shapes_and_share_of_parameters() -> None:
    tensors = whisper(768, 12, 12)
    del tensors["proj_out.weight"]  # tied to the embedding
    chosen = layers.decomposed(tensors)
    assert Counter(tensors[name] for name in chosen) == {(768, 768): 144, (3072, 768): 24, (768, 3072): 24}
    sizes = {name: int(np.prod(shape)) for name, shape in tensors.items()}
    assert round(100 * sum(sizes[name] for name in chosen) / sum(sizes.values())) == 82


def test_whisper_without_the_model_prefix_and_encoder_only_are_whisper() -> None:
    names = {name.removeprefix("model."): shape for name, shape in whisper(64, 2, 2).items()}
    assert layers.naming(names) == "hf-whisper"
    assert len(layers.decomposed(names)) == 2 * 6 + 2 * 10
    encoder = {name: shape for name, shape in names.items() if name.startswith("encoder.")}
    assert layers.naming(encoder) == "hf-whisper"
    assert len(layers.decomposed(encoder)) == 2 * 6


def test_moonshine_has_whispers_convolutions_and_is_no_whisper() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50}
    stacks = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    config = transformers.MoonshineConfig(**sizes, **stacks)
    with torch.device("meta"):
        names = transformers.MoonshineForConditionalGeneration(config).state_dict()
    assert {"model.encoder.conv1.weight", "model.decoder.layers.0.self_attn.q_proj.weight"} <= names.keys()
    assert layers.naming(names) == "other"
    chosen = layers.select(names, config=config.to_dict())
    assert chosen.rule == "moonshine" and "model.decoder.layers.0.encoder_attn.o_proj.weight" in chosen.names


def test_a_kind_is_the_same_in_both_namings() -> None:
    names = [name for name in whisper(64, 1, 1) if name != "proj_out.weight"]
    kinds = {name: layers.kind(name) for name in names}
    assert {name: layers.kind(openai_name(name)) for name in names} == kinds
    assert Counter(kinds.values()) == {
        **{f"encoder self-attention {part}": 1 for part in ("q", "k", "v", "out")},
        **{f"decoder self-attention {part}": 1 for part in ("q", "k", "v", "out")},
        **{f"decoder cross-attention {part}": 1 for part in ("q", "k", "v", "out")},
        **{f"{stack} mlp {part}": 1 for stack in ("encoder", "decoder") for part in ("fc1", "fc2")},
        "layer norm": 14,
        "conv": 4,
        "position embedding": 2,
        "embedding": 1,
        "bias": 13,
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("proj_out.weight", "head"),
        ("lm_head.weight", "head"),
        ("encoder.layers.0.self_attn.linear_q.weight", "encoder self-attention q"),
        ("encoder.layers.0.self_attn.relative_k_proj.weight", "encoder self-attention positions"),
        ("encoder.layers.0.attn.to_kv.weight", "encoder self-attention kv"),
        ("encoder.layers.0.feed_forward1.linear2.weight", "encoder mlp fc2"),
        ("transf_decoder._decoder.layers.0.second_sub_layer.key_net.weight", "decoder cross-attention k"),
        ("transf_decoder._decoder.layers.0.third_sub_layer.dense_in.weight", "decoder mlp fc1"),
        (
            "model.embed_tokens_extend.audio_embed.encoder.encoders.1.self_attn.o_proj.weight",
            "encoder self-attention out",
        ),
        ("model.embed_tokens_extend.audio_embed.up_proj_for_speech.weight", "embedding"),
        ("wavlm.encoder.layers.0.attention.rel_attn_embed.weight", "embedding"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "encoder mlp gate"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "position embedding"),
        ("decoder.block.0.layer.1.EncDecAttention.o.weight", "decoder cross-attention out"),
        ("shared.weight", "embedding"),
        ("model.layers.0.mlp.gate_up_proj.weight", "mlp gate and up"),
        ("model.layers.0.mlp.down_proj.weight", "mlp down"),
        ("model.layers.0.post_attention_layernorm.weight", "layer norm"),
        ("bert.encoder.layer.3.attention.output.dense.weight", "encoder self-attention out"),
        ("bert.encoder.layer.3.output.dense.weight", "encoder mlp fc2"),
        ("transformer.h.0.attn.c_attn.weight", "self-attention qkv"),
        ("transformer.h.0.mlp.c_proj.weight", "mlp fc2"),
        ("transformer.ln_f.weight", "layer norm"),
        ("transformer.wpe.weight", "position embedding"),
        ("wav2vec2.encoder.layers.0.feed_forward.output_dense.weight", "encoder mlp fc2"),
        ("wav2vec2.feature_extractor.conv_layers.0.conv.weight", "conv"),
        ("wav2vec2.feature_projection.projection.weight", "other"),
        ("logit_scale", "other"),
    ],
)
def test_kinds_of_other_models(name: str, kind: str) -> None:
    assert layers.kind(name) == kind


# --- other architectures: the linear maps inside the numbered layers, found on the modules themselves -----------------

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SPEECH = SMALL | {
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64}
MODELS = {
    "T5ForConditionalGeneration": ("T5Config", T5 | {"feed_forward_proj": "gated-gelu"}, 4 * 2 + 8 * 2 + 3 * 4),
    "BartForConditionalGeneration": (
        "BartConfig",
        BART | {"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
        2 * 6 + 2 * 10,
    ),
    "LlamaForCausalLM": ("LlamaConfig", SMALL, 14),
    "Qwen2ForCausalLM": ("Qwen2Config", SMALL, 14),
    "Gemma2ForCausalLM": ("Gemma2Config", SMALL, 14),
    "Phi3ForCausalLM": ("Phi3Config", SMALL | {"pad_token_id": 0}, 8),
    "Wav2Vec2ForCTC": ("Wav2Vec2Config", SPEECH, 12),
    "HubertModel": ("HubertConfig", SPEECH, 12),
    "BertForMaskedLM": ("BertConfig", SMALL, 12),
    "DistilBertModel": (
        "DistilBertConfig",
        {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
        12,
    ),
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, 8),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SMALL, 8),
    "ViTForImageClassification": ("ViTConfig", SMALL | {"image_size": 32, "patch_size": 8}, 12),
}


def build(name: str) -> tuple[dict[str, Any], set[str], dict[str, Any]]:
    """State dict on the meta device, names of the linear weights inside numbered layers, config."""
    config_name, arguments, _ = MODELS[name]
    config = getattr(transformers, config_name)(**arguments)
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    inside = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, linear) and re.search(r"\.\d+\.", path)
    }
    return model.state_dict(), inside, config.to_dict()


@pytest.mark.parametrize("name", MODELS)
def test_the_rule_of_an_architecture_takes_the_linear_maps_of_its_layers(name: str) -> None:
    tensors, inside, config = build(name)
    chosen = layers.select(tensors, config=config)
    assert chosen.notice is None
    assert chosen.names == inside
    assert len(inside) == MODELS[name][2]
    # without a config the shapes decide, and the user is told; nothing of a layer may be missed
    guess = layers.select(tensors)
    assert guess.rule == "shape"
    assert guess.notice is not None and guess.notice.startswith("the checkpoint has no config with a model_type")
    assert guess.names >= inside
    assert not [n for n in guess.names if re.search("embed|wte|wpe|shared|lm_head|norm|ln_", n)]


def test_attention_and_mlp_partition_the_projections() -> None:
    for name in MODELS:
        tensors, inside, config = build(name)
        attention = layers.decomposed(tensors, config=config, target=Target(select="attention"))
        mlp = layers.decomposed(tensors, config=config, target=Target(select="mlp"))
        assert attention and mlp and not attention & mlp
        assert attention | mlp == inside
        assert attention == layers.attention_only(inside)


def test_an_unknown_architecture_is_decided_by_shape_with_a_notice() -> None:
    tensors = {
        "stem.weight": (16, 16),
        "stem.bias": (16,),
        "narrow.weight": (64, 15),
        "kernel.weight": (16, 16, 3),
        "tok_embed.weight": (64, 32),
        "pos.weight": (64, 32),
        "lm_head.weight": (64, 32),
        "norm_proj.weight": (32, 32),
        "table": (64, 64),
    }
    chosen = layers.select(tensors, config={"model_type": "thing"})
    assert chosen.names == {"stem.weight"}
    assert chosen.notice == (
        "no rule for model_type 'thing'; decomposing 1 matrices: "
        "those of 16 x 16 or more that are no embedding, head or norm"
    )
    nothing = layers.select({"a.bias": (4,)})
    assert not nothing.names and nothing.notice is not None


def test_a_rule_that_finds_nothing_is_replaced_with_a_notice() -> None:
    chosen = layers.select({"blocks.0.lin.weight": (32, 32)}, config={"model_type": "llama"})
    assert chosen.names == {"blocks.0.lin.weight"}
    assert chosen.notice is not None and chosen.notice.startswith("the rule of llama and similar matches no matrix; ")


def test_only_floating_matrices_are_chosen() -> None:
    def tensor(shape: tuple[int, ...], dtype: Any) -> SimpleNamespace:
        return SimpleNamespace(shape=shape, dtype=np.dtype(dtype))

    tensors = {
        "a.weight": tensor((32, 32), np.float32),
        "b.weight": tensor((32, 32), np.float16),
        "c.weight": tensor((32, 32), ml_dtypes.bfloat16),
        "d.weight": tensor((32, 32), np.int64),
        "e.weight": tensor((32,), np.float32),
        "f.weight": torch.zeros(32, 32, dtype=torch.bfloat16, device="meta"),
        "g.weight": torch.zeros(32, 32, dtype=torch.int8, device="meta"),
    }
    assert layers.decomposed(tensors, target=Target(include=("weight",))) == {f"{x}.weight" for x in "abcf"}


# --- target ----------------------------------------------------------------------------------------------------------


def test_include_replaces_the_rule_and_exclude_takes_out() -> None:
    tensors = whisper(64, 2, 2)
    included = layers.select(tensors, target=Target(include=(r"decoder.*\.fc1\.", "embed_tokens")))
    assert included.names == {
        "model.decoder.embed_tokens.weight",
        "model.decoder.layers.0.fc1.weight",
        "model.decoder.layers.1.fc1.weight",
    }
    assert included.rule == "target.include"
    without = layers.decomposed(tensors, target=Target(exclude=(r"\.fc[12]\.", "^model.encoder")))
    assert len(without) == 2 * 8
    assert without == {n for n in without if "decoder" in n and "_attn." in n}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            SimpleNamespace(select="projections", include=["fc1", "a("], exclude=[]),
            "target.include[1]: 'a(' is not a regular expression: missing ), unterminated subpattern at position 1",
        ),
        (
            SimpleNamespace(select="projections", include=[], exclude=["["]),
            "target.exclude[0]: '[' is not a regular expression: unterminated character set at position 0",
        ),
        (
            Target(include=("fc9", "bias")),
            "target.include: 'fc9', 'bias' matches none of the 20 matrices, whose names are like 'model.encoder.embed_positions.weight'",
        ),
        (Target(exclude=("weight",)), "target.exclude: 'weight' takes out all 16 chosen matrices"),
    ],
)
def test_bad_targets_are_one_line_errors(target: Any, message: str) -> None:
    with pytest.raises(LorsError) as error:
        layers.decomposed(whisper(64, 1, 1), target=target)
    assert str(error.value) == message


def test_a_selected_part_that_does_not_exist_is_an_error() -> None:
    tensors = {"lin.weight": (32, 32)}
    with pytest.raises(LorsError) as error:
        layers.decomposed(tensors, target=Target(select="attention"))
    assert str(error.value) == "target.select: 'attention' matches none of the 1 matrices"


# --- depth -----------------------------------------------------------------------------------------------------------


def test_depth_runs_from_0_to_1_in_each_stack_and_is_0_outside() -> None:
    names = list(whisper(64, 5, 3))
    depth = layers.positions(names)
    assert depth.keys() == set(names)
    assert [depth[f"model.encoder.layers.{i}.fc1.bias"] for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [depth[f"model.decoder.layers.{i}.encoder_attn.q_proj.weight"] for i in range(3)] == [0, 0.5, 1]
    outside = {name for name in names if ".layers." not in name}
    assert "model.decoder.layer_norm.weight" in outside and "model.encoder.conv1.weight" in outside
    assert {depth[name] for name in outside} == {0.0}


def test_a_single_layer_is_at_1() -> None:
    assert layers.positions(["model.decoder.layers.0.fc1.weight"]) == {"model.decoder.layers.0.fc1.weight": 1.0}


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("encoder.block.1.layer.0.SelfAttention.q.weight", 0.5),  # the block is the layer, not the layer inside it
        ("transformer.h.6.attn.c_attn.weight", 1.0),
        ("h.3.attn.c_attn.weight", 0.5),
        ("feature_extractor.conv_layers.2.conv.weight", 0.0),
        ("encoder.block.2.layer.1.DenseReluDense.wi.weight", 1.0),
    ],
)
def test_depth_in_other_namings(name: str, depth: float) -> None:
    others = ["encoder.block.2.layer.1.DenseReluDense.wi.weight", "transformer.h.6.ln_1.bias", "h.6.ln_1.bias"]
    assert layers.position(name, others) == depth


@pytest.mark.parametrize(
    ("name", "layer", "part"),
    [
        ("model.encoder.layers.11.fc1.weight", ("model.encoder.layers.", 11), "encoder"),
        ("decoder.blocks.3.attn.query.weight", ("decoder.blocks.", 3), "decoder"),
        ("encoder.block.2.layer.1.SelfAttention.q.weight", ("encoder.block.", 2), "encoder"),
        ("h.0.mlp.c_fc.weight", ("h.", 0), ""),
        ("model.layers.7.mlp.up_proj.weight", ("model.layers.", 7), "model"),
        ("model.path.3.weight", None, ""),
        ("model.encoder.conv1.weight", None, ""),
    ],
)
def test_a_layer_and_its_number(name: str, layer: tuple[str, int] | None, part: str) -> None:
    found = layers.layer_of(name)
    assert found == layer and (found is None or found.part == part)
