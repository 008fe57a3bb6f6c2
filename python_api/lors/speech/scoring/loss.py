"""The loss that training minimises, of references that it has not seen."""

from __future__ import annotations

from typing import Any

from ...errors import LorsError
from ..data.loading import load_in_order
from ..data.utterance import Corpus
from ..model.tokens import labels
from .evaluation import Decoder

__all__ = ["mean_loss", "summed_loss"]


def mean_loss(decoder: Decoder, part: Corpus, task: str) -> float:
    """Cross-entropy of the next token given the reference before it, nats, mean over all tokens of utterances of one
    language, in float32: that of `trainer`, without smoothing. References longer than the decoder and recordings longer than
    the window do not count.

    LorsError where nothing is left.
    """
    total, count = summed_loss(decoder, part, task)
    if not count:
        raise LorsError(f"loss: expected utterances with references that fit the decoder for {task}, got none")
    return total / count


def summed_loss(decoder: Decoder, part: Corpus, task: str) -> tuple[float, int]:
    """(sum of the cross-entropies, number of tokens). Nothing is decoded; `part` has the task's references."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers.models.whisper.modeling_whisper import shift_tokens_right

    model: Any = decoder.model
    config, total, count = model.config, 0.0, 0
    for batch in load_in_order(part, decoder.features, decoder.batch_size, decoder.workers):
        decoder.left_out.note(batch.unusable)
        for rows, mel in batch.parts:
            wanted = [(i, labels(decoder.tokenizer, part[row], task)) for i, row in enumerate(rows)]
            wanted = [(i, ids) for i, ids in wanted if len(ids) <= config.max_target_positions]
            if not wanted or mel.shape[2] > decoder.features.extractor.nb_max_frames:
                continue
            longest = max(len(ids) for _, ids in wanted)
            target = torch.tensor([ids + [-100] * (longest - len(ids)) for _, ids in wanted], device=model.device)
            heard = mel[[i for i, _ in wanted]].to(model.device, model.dtype)
            with torch.inference_mode():
                spoken = shift_tokens_right(target, config.pad_token_id, config.decoder_start_token_id)
                logits = model(input_features=heard, decoder_input_ids=spoken).logits.float()
                total += float(cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"))
            count += int(target.ne(-100).sum())
    return total, count
