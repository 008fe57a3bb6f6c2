"""A tiny random model of every speech architecture of docs/models.md, as transformers builds and saves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["SPEECH_MODELS", "SpeechModel"]


class SpeechModel(NamedTuple):
    """config: what its configuration class is called with. loads: the class of transformers that the result is loaded by."""

    config: str
    loads: str
    sizes: dict[str, Any]

    def build(self, seed: int = 0) -> Any:
        """A model with random weights; those that transformers starts at 0 or 1 are random too."""
        import torch
        import transformers

        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.sizes)
        model = getattr(transformers, self.loads)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model


_ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
_DECODER = {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}
_WAVES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 40,
    "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
}  # fmt: skip
_STACK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_TEXT = {**_STACK, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 64}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_FAST_CONFORMER = {**_STACK, "num_mel_bins": 16, "subsampling_conv_channels": 16, "max_position_embeddings": 64}

SPEECH_MODELS: dict[str, SpeechModel] = {
    "whisper": SpeechModel(
        "WhisperConfig", "WhisperForConditionalGeneration",
        {**_ENCODER, **_DECODER, "d_model": 32, "vocab_size": 96, "num_mel_bins": 16, "max_source_positions": 32,
         "max_target_positions": 24, "suppress_tokens": None, "begin_suppress_tokens": None, **_SPECIAL,
         "decoder_start_token_id": 3},
    ),
    "moonshine": SpeechModel(
        "MoonshineConfig", "MoonshineForConditionalGeneration",
        {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 96, "encoder_num_hidden_layers": 2,
         "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2},
    ),
    "moonshine_streaming": SpeechModel(
        "MoonshineStreamingConfig", "MoonshineStreamingForConditionalGeneration",
        {**_STACK, "num_key_value_heads": 2, "vocab_size": 96, "encoder_config": {
            **_STACK, "num_key_value_heads": 2, "sliding_windows": [[4, 1], [4, 0]]}},
    ),
    "parakeet_ctc": SpeechModel(
        "ParakeetCTCConfig", "ParakeetForCTC", {"vocab_size": 41, "pad_token_id": 40, "encoder_config": _FAST_CONFORMER},
    ),
    "parakeet_tdt": SpeechModel(
        "ParakeetTDTConfig", "ParakeetForTDT",
        {"vocab_size": 41, "blank_token_id": 40, "decoder_hidden_size": 24, "encoder_config": _FAST_CONFORMER},
    ),
    "voxtral": SpeechModel(
        "VoxtralConfig", "VoxtralForConditionalGeneration",
        {"audio_config": {**_STACK, "num_mel_bins": 16, "max_source_positions": 32}, "audio_token_id": 90,
         "text_config": {"model_type": "llama", **_TEXT}},
    ),
    "granite_speech": SpeechModel(
        "GraniteSpeechConfig", "GraniteSpeechForConditionalGeneration",
        {"text_config": {"model_type": "granite", **_TEXT}, "audio_token_index": 90, "has_lora_adapter": False,
         "encoder_config": {"input_dim": 32, "num_layers": 2, "hidden_dim": 32, "feedforward_mult": 2, "num_heads": 2,
                            "dim_head": 16, "output_dim": 20, "context_size": 10, "max_pos_emb": 16},
         "projector_config": {"model_type": "blip_2_qformer", **_STACK, "encoder_hidden_size": 32,
                              "cross_attention_frequency": 1}},
    ),
    "qwen2_audio": SpeechModel(
        "Qwen2AudioConfig", "Qwen2AudioForConditionalGeneration",
        {"audio_config": {**_ENCODER, "d_model": 32, "num_mel_bins": 16, "max_source_positions": 32},
         "text_config": {"model_type": "qwen2", **_TEXT, "tie_word_embeddings": False}, "audio_token_index": 90},
    ),
    "qwen3_asr": SpeechModel(
        "Qwen3ASRConfig", "Qwen3ASRForConditionalGeneration",
        {"audio_config": {**_ENCODER, "d_model": 32, "num_mel_bins": 16, "output_dim": 32, "n_window": 4,
                          "downsample_hidden_size": 16},
         "text_config": {"model_type": "qwen3", **_TEXT}, "audio_token_id": 90, "timestamp_token_id": 91, **_SPECIAL},
    ),
    "glmasr": SpeechModel(
        "GlmAsrConfig", "GlmAsrForConditionalGeneration",
        {"audio_config": {**_STACK, "num_mel_bins": 16, "max_position_embeddings": 32}, "audio_token_id": 90,
         "text_config": {"model_type": "llama", **_TEXT}},
    ),
    "wav2vec2": SpeechModel("Wav2Vec2Config", "Wav2Vec2ForCTC", {**_WAVES}),
    "wav2vec2-bert": SpeechModel(
        "Wav2Vec2BertConfig", "Wav2Vec2BertForCTC",
        {**_STACK, "vocab_size": 40, "feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 5,
         "add_adapter": True, "output_hidden_size": 32},
    ),
    "hubert": SpeechModel("HubertConfig", "HubertForCTC", {**_WAVES}),
    "wavlm": SpeechModel("WavLMConfig", "WavLMForCTC", {**_WAVES, "num_buckets": 8, "max_bucket_distance": 16}),
    "speech_to_text": SpeechModel(
        "Speech2TextConfig", "Speech2TextForConditionalGeneration",
        {**_ENCODER, **_DECODER, "d_model": 32, "vocab_size": 96, "conv_channels": 16, "input_feat_per_channel": 16,
         "max_source_positions": 32, "max_target_positions": 24},
    ),
    "seamless_m4t_v2": SpeechModel(
        "SeamlessM4Tv2Config", "SeamlessM4Tv2ForSpeechToText",
        {**_ENCODER, **_DECODER, "hidden_size": 32, "vocab_size": 96, "speech_encoder_layers": 2,
         "speech_encoder_attention_heads": 2, "speech_encoder_intermediate_size": 64, "feature_projection_input_dim": 16,
         "conv_depthwise_kernel_size": 5, "max_position_embeddings": 32},
    ),
    "phi4_multimodal": SpeechModel(
        "Phi4MultimodalConfig", "Phi4MultimodalForCausalLM",
        {**_STACK, "num_key_value_heads": 1, "vocab_size": 96, "max_position_embeddings": 64,
         "original_max_position_embeddings": 64, **_SPECIAL,
         "vision_config": {**_STACK, "image_size": 28, "crop_size": 28, "patch_size": 14, "image_token_id": 90},
         "audio_config": {"hidden_size": 32, "intermediate_size": 64, "num_blocks": 2, "num_attention_heads": 2,
                          "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "input_size": 16,
                          "nemo_conv_channels": 16, "bias_max_distance": 8, "audio_token_id": 91}},
    ),
    "kyutai_speech_to_text": SpeechModel(
        "KyutaiSpeechToTextConfig", "KyutaiSpeechToTextForConditionalGeneration",
        {**_STACK, "ffn_dim": 64, "vocab_size": 97, "codebook_vocab_size": 33, "num_codebooks": 4, **_SPECIAL,
         "audio_bos_token_id": 32, "audio_pad_token_id": 96,
         "codec_config": {"model_type": "mimi", **_STACK, "num_filters": 4, "upsampling_ratios": [2, 2], "codebook_dim": 16,
                          "codebook_size": 32, "vector_quantization_hidden_dimension": 16, "num_quantizers": 4,
                          "num_key_value_heads": 2, "head_dim": 16, "upsample_groups": 32}},
    ),
    "cohere_asr": SpeechModel(
        "CohereAsrConfig", "CohereAsrForConditionalGeneration",
        {**_STACK, "vocab_size": 96, "encoder_config": {"model_type": "parakeet_encoder", **_FAST_CONFORMER}},
    ),
}  # fmt: skip


def saved(kind: str, directory: Any, change: Callable[[Any], None] | None = None) -> Any:
    """The model of a kind saved into a directory as transformers does; `change` may alter its weights before."""
    import torch

    model = SPEECH_MODELS[kind].build()
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(directory)
    return model
