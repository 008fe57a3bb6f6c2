"""ONNX graphs of encoder and decoder, by torch's own exporter, with the names that optimum gives files, inputs and outputs.

    encoder_model.onnx             input_features -> last_hidden_state
    decoder_model.onnx             input_ids, encoder_hidden_states -> logits, present.N.{decoder,encoder}.{key,value}
    decoder_with_past_model.onnx   one of input_ids, past_key_values.N... -> logits, present.N.decoder.{key,value}

A first step by the decoder, each further one by the decoder with past, which takes what the step before gave. float16: inputs and
logits stay float32, hidden states and the cache are float16. int8: matrix products quantized by ONNX Runtime's quantize_dynamic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files.directory import OutputDirectory
from ..files.writing import writing
from .beside import accompany
from .model import Whisper
from .peer import converting, needed

__all__ = ["DTYPES", "write"]

DTYPES = ("float32", "float16", "int8")
_PARTS = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")  # of a layer's cache
_ONE_FILE = 1_900_000_000  # bytes of weights; ONNX' own limit is 2 GiB


class Encoder(nn.Module):
    """Mel features [batch, mels, frames] in float32 -> hidden states [batch, frames / 2, width] in the model's type."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder, self.dtype = model.model.encoder, model.dtype

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        return self.encoder(input_features.to(self.dtype)).last_hidden_state


class Decoder(nn.Module):
    """The first tokens [batch, length] and the encoder's hidden states -> logits in float32, and the cache, flat."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.head = model.model.decoder, model.proj_out

    def forward(self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.decoder(input_ids, encoder_hidden_states=encoder_hidden_states, use_cache=True)
        caches = (out.past_key_values.self_attention_cache, out.past_key_values.cross_attention_cache)
        layers = zip(*(cache.layers for cache in caches), strict=True)
        cached = [tensor for pair in layers for layer in pair for tensor in (layer.keys, layer.values)]
        return self.head(out.last_hidden_state).float(), *cached


class DecoderWithPast(Decoder):
    """One more token [batch, 1] and the cache of all before it -> logits in float32, and the decoder's part of the cache."""

    def forward(self, input_ids: torch.Tensor, past: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        from transformers import DynamicCache, EncoderDecoderCache

        own, cross = DynamicCache(), DynamicCache()
        for layer in range(len(past) // 4):
            own.update(past[4 * layer], past[4 * layer + 1], layer)
            cross.update(past[4 * layer + 2], past[4 * layer + 3], layer)
        cache = EncoderDecoderCache(own, cross)  # knows by its length that the encoder's part is complete
        width = self.decoder.config.d_model
        unread = torch.zeros(
            input_ids.shape[0], 1, width, dtype=self.head.weight.dtype
        )  # the cache has keys and values of it
        out = self.decoder(input_ids, encoder_hidden_states=unread, past_key_values=cache, use_cache=True)
        layers = out.past_key_values.self_attention_cache.layers
        cached = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        return self.head(out.last_hidden_state).float(), *cached


def write(whisper: Whisper, output: OutputDirectory, dtype: str, notices: list[str]) -> None:
    """Writes the three graphs, and configuration, tokenizer and feature extractor beside them."""
    transformers = needed("transformers", "onnx")
    for module in ("onnx", "onnxscript", *(["onnxruntime"] if dtype == "int8" else [])):
        needed(module, "onnx")
    whisper.require_values(dtype)
    with writing(output.target), converting(whisper.name, "torch.onnx"):
        kind = torch.float16 if dtype == "float16" else torch.float32
        model = transformers.WhisperForConditionalGeneration.from_pretrained(
            str(whisper.directory), dtype=kind, local_files_only=True, attn_implementation="eager"
        ).eval()
        _encoder(model, output.path / "encoder_model.onnx", dtype)
        _decoder(model, output.path / "decoder_model.onnx", dtype)
        _decoder_with_past(model, output.path / "decoder_with_past_model.onnx", dtype)
    accompany(whisper, output, "onnx", notices)


def _encoder(model: Any, path: Path, dtype: str) -> None:
    config = model.config
    features = torch.zeros(2, config.num_mel_bins, 2 * config.max_source_positions)
    batch = {0: torch.export.Dim("batch")}
    _export(Encoder(model), (features,), (batch,), ["input_features"], ["last_hidden_state"], path, dtype)


def _decoder(model: Any, path: Path, dtype: str) -> None:
    config = model.config
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    hidden = torch.zeros(2, config.max_source_positions, config.d_model, dtype=model.dtype)
    batch = torch.export.Dim("batch")
    length = torch.export.Dim("length", max=config.max_target_positions)
    presents = [f"present.{layer}.{part}" for layer in range(config.decoder_layers) for part in _PARTS]
    names = ["input_ids", "encoder_hidden_states"]
    _export(
        Decoder(model), (tokens, hidden), ({0: batch, 1: length}, {0: batch}), names, ["logits", *presents], path, dtype
    )


def _decoder_with_past(model: Any, path: Path, dtype: str) -> None:
    config = model.config
    heads = config.decoder_attention_heads
    tokens = torch.zeros(2, 1, dtype=torch.int64)
    batch = torch.export.Dim("batch")
    length = torch.export.Dim("past", max=config.max_target_positions - 1)
    past, shapes, names, presents = [], [], [], []
    for layer in range(config.decoder_layers):
        for part in _PARTS:
            own = part.startswith("decoder")
            size = 3 if own else config.max_source_positions
            past.append(torch.zeros(2, heads, size, config.d_model // heads, dtype=model.dtype))
            shapes.append({0: batch, 2: length} if own else {0: batch})
            names.append(f"past_key_values.{layer}.{part}")
            presents += [f"present.{layer}.{part}"] if own else []
    _export(
        DecoderWithPast(model),
        (tokens, past),
        ({0: batch}, shapes),
        ["input_ids", *names],
        ["logits", *presents],
        path,
        dtype,
    )


def _export(
    module: nn.Module,
    inputs: tuple[Any, ...],
    shapes: tuple[Any, ...],
    names: list[str],
    outputs: list[str],
    path: Path,
    dtype: str,
) -> None:
    with torch.no_grad():
        program = torch.onnx.export(
            module, inputs, dynamo=True, dynamic_shapes=shapes, input_names=names, output_names=outputs, verbose=False
        )
    size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    if dtype != "int8":
        program.save(path, external_data=size > _ONE_FILE)
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = path.with_suffix(".whole")
    program.save(whole, external_data=size > _ONE_FILE)
    quantize_dynamic(whole, path, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)
    for part in path.parent.glob(f"{whole.name}*"):
        part.unlink()
