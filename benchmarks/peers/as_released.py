"""The released procedure as a whole command: `python -m benchmarks.peers.as_released BASE OUT EXPERT...`

Loads every model with transformers in float32, merges with the full SVD, saves with save_pretrained.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(base: str, out: str, *experts: str) -> None:
    begin = time.perf_counter()
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from benchmarks.released import PAPER, Clock, merge

    model = WhisperForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    loaded = [WhisperForConditionalGeneration.from_pretrained(path, dtype=torch.float32) for path in experts]
    seconds = {"load": time.perf_counter() - begin}
    clock = Clock()
    # named_parameters lists the tied embedding once; a state dict would merge it twice.
    states = [{name: tensor.data for name, tensor in each.named_parameters()} for each in (model, *loaded)]
    merged = merge(states[0], states[1:], clock=clock, **PAPER)
    seconds |= clock.phases
    begin = time.perf_counter()
    model.load_state_dict(merged, strict=False)
    model.save_pretrained(out)
    WhisperProcessor.from_pretrained(base).save_pretrained(out)
    seconds["save"] = time.perf_counter() - begin
    Path(out, "phases.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
