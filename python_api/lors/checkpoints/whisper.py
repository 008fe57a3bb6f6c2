"""What a Whisper is made of: its dimensions, and each weight's shape, transformers' name and openai-whisper's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field, model_validator

from ..files.documents import Document

__all__ = ["Dims", "Weight", "weights"]

_Count = Annotated[int, Field(gt=0, lt=2**31)]
_Layers = Annotated[int, Field(gt=0, le=1024)]  # each is a list of tensors below


class Dims(Document):
    """openai-whisper's dimensions of a model."""

    n_mels: _Count
    n_audio_ctx: _Count
    n_audio_state: _Count
    n_audio_head: _Count
    n_audio_layer: _Layers
    n_vocab: _Count
    n_text_ctx: _Count
    n_text_state: _Count
    n_text_head: _Count
    n_text_layer: _Layers

    @classmethod
    def of_config(cls, config: Mapping[str, Any], where: str) -> Dims:
        """Those of a config.json of transformers. LorsError for one of a model that openai-whisper cannot describe."""
        return _Config.check(dict(config), where).dims


class _Config(Document):
    """What of transformers' configuration decides which weights there are, and how they are used."""

    model_config = ConfigDict(extra="ignore")

    d_model: _Count
    encoder_layers: _Layers
    decoder_layers: _Layers
    encoder_attention_heads: _Count
    decoder_attention_heads: _Count
    encoder_ffn_dim: _Count
    decoder_ffn_dim: _Count
    vocab_size: _Count
    num_mel_bins: _Count
    max_source_positions: _Count
    max_target_positions: _Count
    activation_function: str = "gelu"
    scale_embedding: bool = False

    @model_validator(mode="after")
    def _as_openai(self) -> _Config:
        wide = 4 * self.d_model
        for name, found in (("encoder_ffn_dim", self.encoder_ffn_dim), ("decoder_ffn_dim", self.decoder_ffn_dim)):
            if found != wide:
                raise ValueError(f"{name}: expected 4 * d_model = {wide}, as every Whisper of openai has, got {found}")
        for name, found in (
            ("encoder_attention_heads", self.encoder_attention_heads),
            ("decoder_attention_heads", self.decoder_attention_heads),
        ):
            if self.d_model % found:
                raise ValueError(f"{name}: expected a divisor of d_model = {self.d_model}, got {found}")
        if self.activation_function != "gelu" or self.scale_embedding:
            raise ValueError(
                "expected activation_function gelu and scale_embedding false, as every Whisper of openai has"
            )
        return self

    @property
    def dims(self) -> Dims:
        return Dims(
            n_mels=self.num_mel_bins, n_vocab=self.vocab_size,
            n_audio_ctx=self.max_source_positions, n_audio_state=self.d_model,
            n_audio_head=self.encoder_attention_heads, n_audio_layer=self.encoder_layers,
            n_text_ctx=self.max_target_positions, n_text_state=self.d_model,
            n_text_head=self.decoder_attention_heads, n_text_layer=self.decoder_layers,
        )  # fmt: skip


class Weight(NamedTuple):
    """One tensor, named both ways. The output projection is the token embedding and no tensor of its own."""

    transformers: str
    openai: str
    shape: tuple[int, ...]


# modules of a layer: transformers' name, openai-whisper's name
_SELF, _CROSS = (("self_attn", "attn"), ("encoder_attn", "cross_attn"))
_PROJECTIONS = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out"))
_UNBIASED = "key"


def weights(dims: Dims) -> list[Weight]:
    """Every tensor of a Whisper of these dimensions, in openai-whisper's order."""
    audio, text = dims.n_audio_state, dims.n_text_state
    found = [Weight("model.encoder.embed_positions.weight", "encoder.positional_embedding", (dims.n_audio_ctx, audio))]
    for name, inputs in (("conv1", dims.n_mels), ("conv2", audio)):
        found += _both(f"model.encoder.{name}", f"encoder.{name}", (audio, inputs, 3))
    for layer in range(dims.n_audio_layer):
        found += _layer("encoder", layer, audio, (_SELF,))
    found += _both("model.encoder.layer_norm", "encoder.ln_post", (audio,))
    found += [
        Weight("model.decoder.embed_positions.weight", "decoder.positional_embedding", (dims.n_text_ctx, text)),
        Weight("model.decoder.embed_tokens.weight", "decoder.token_embedding.weight", (dims.n_vocab, text)),
    ]
    for layer in range(dims.n_text_layer):
        found += _layer("decoder", layer, text, (_SELF, _CROSS))
    return found + _both("model.decoder.layer_norm", "decoder.ln", (text,))


def _layer(part: str, number: int, width: int, attentions: tuple[tuple[str, str], ...]) -> Iterator[Weight]:
    theirs, ours = f"model.{part}.layers.{number}", f"{part}.blocks.{number}"
    for module, name in attentions:
        for projection, role in _PROJECTIONS:
            pair = _both(f"{theirs}.{module}.{projection}", f"{ours}.{name}.{role}", (width, width))
            yield from pair[: 1 if role == _UNBIASED else 2]
        yield from _both(f"{theirs}.{module}_layer_norm", f"{ours}.{name}_ln", (width,))
    yield from _both(f"{theirs}.fc1", f"{ours}.mlp.0", (4 * width, width))
    yield from _both(f"{theirs}.fc2", f"{ours}.mlp.2", (width, 4 * width))
    yield from _both(f"{theirs}.final_layer_norm", f"{ours}.mlp_ln", (width,))


def _both(theirs: str, ours: str, shape: tuple[int, ...]) -> list[Weight]:
    """A module's weight and its bias, of the length of the output."""
    return [
        Weight(f"{theirs}.weight", f"{ours}.weight", shape),
        Weight(f"{theirs}.bias", f"{ours}.bias", shape[:1]),
    ]
