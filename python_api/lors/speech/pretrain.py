"""Trains the tiny multilingual base that the experiments start from: ``python -m lors.speech.pretrain CORPUS -o DIR``.

Cross-entropy on the decoder and CTC on the encoder (0.7 and 0.3; the CTC head only makes attention find the audio
sooner and is thrown away). A run killed at any point continues from its last snapshot with the same batches.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files.writing import replacing
from .data.corpus import load_corpus
from .data.domain import concepts, sentence
from .data.features import Features, kept_in
from .data.languages import LANGUAGES
from .data.utterance import Corpus
from .model.tiny import Size, build_model, build_processor
from .model.tokens import labels

__all__ = ["main", "pretrain"]

_BATCH = 16
_LEARNING_RATE = 1e-3
_WARM_UP = 200
_CTC_WEIGHT = 0.3
_MAX_GRADIENT = 1.0
_SNAPSHOT = 500  # steps


def pretrain(corpus: Corpus, out: Path, *, steps: int, early: int, size: Size, seed: int, cache: Path) -> None:
    """Writes ``out/final``, ``out/early`` (the model after `early` steps), both in fp16, and ``out/log.jsonl``."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    processor = build_processor(_texts(), size)
    model = build_model(processor, LANGUAGES, size)
    head = torch.nn.Linear(size.width, size.vocabulary + 1)  # the last class is CTC's blank
    parameters = [*model.parameters(), *head.parameters()]
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    with kept_in(cache) as home:
        features = Features(processor.feature_extractor, home)
        mel = np.stack([features.of(utterance.audio) for utterance in corpus])
    items = _items(corpus, processor.tokenizer)
    step = _restore(out, model, head, optimizer)
    began, log = time.monotonic(), (out / "log.jsonl").open("a", encoding="utf-8")
    for chosen in _batches(len(items), seed, steps, step):
        loss = _loss(model, head, mel, [items[i] for i in chosen])
        rate = _schedule(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            record = {
                "step": step,
                "loss": round(loss.item(), 4),
                "lr": rate,
                "seconds": round(time.monotonic() - began, 1),
            }
            log.write(json.dumps(record) + "\n")
            log.flush()
        if step == early:
            _save(model, processor, out / "early")
        if step % _SNAPSHOT == 0:
            _snapshot(out, model, head, optimizer, step)
    log.close()
    _save(model, processor, out / "final")


def _texts() -> list[str]:
    everything = [c for kind in concepts("train") for c in kind]
    return [sentence(concept, language) for language in (*LANGUAGES, "en") for concept in everything]


def _items(corpus: Corpus, tokenizer: Any) -> list[tuple[int, list[int], list[int]]]:
    """(row of the features, decoder labels, CTC labels) of every utterance and task."""
    items = []
    for row, utterance in enumerate(corpus):
        spoken = tokenizer(utterance.text, add_special_tokens=False).input_ids
        # Every second one is also trained as X -> English.
        tasks = ["transcribe"] + (["translate"] if row % 2 == 0 else [])
        for task in tasks:
            items.append((row, labels(tokenizer, utterance, task), spoken))
    return items


def _batches(count: int, seed: int, steps: int, done: int) -> Iterator[list[int]]:
    """Batches number `done` to `steps`, the same ones whether or not the run was cut."""
    per_epoch = count // _BATCH
    for epoch in range(done // per_epoch, math.ceil(steps / per_epoch)):
        order = list(range(count))
        random.Random(f"{seed} {epoch}").shuffle(order)
        for index in range(per_epoch):
            if done <= epoch * per_epoch + index < steps:
                yield order[index * _BATCH : (index + 1) * _BATCH]


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / _WARM_UP)
    return _LEARNING_RATE * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def _loss(model: Any, head: Any, mel: Any, items: list[tuple[int, list[int], list[int]]]) -> Any:
    import torch
    from torch.nn.functional import ctc_loss, log_softmax
    from torch.nn.utils.rnn import pad_sequence

    batch = torch.from_numpy(mel[[row for row, *_ in items]]).float()
    targets = pad_sequence([torch.tensor(ids) for _, ids, _ in items], batch_first=True, padding_value=-100)
    output = model(input_features=batch, labels=targets)
    spoken = [torch.tensor(ids) for *_, ids in items]
    scores = log_softmax(head(output.encoder_last_hidden_state), -1).transpose(0, 1)
    lengths = torch.full((len(items),), scores.shape[0])
    ctc = ctc_loss(
        scores,
        torch.cat(spoken),
        lengths,
        torch.tensor([len(s) for s in spoken]),
        scores.shape[-1] - 1,
        zero_infinity=True,
    )
    return (1 - _CTC_WEIGHT) * output.loss + _CTC_WEIGHT * ctc


def _save(model: Any, processor: Any, path: Path) -> None:
    import copy

    import torch

    half = copy.deepcopy(model).to(torch.float16)  # halves the file; the words it decodes are the same
    half.save_pretrained(path)
    processor.tokenizer.set_prefix_tokens(language="english", task="transcribe", predict_timestamps=False)
    processor.save_pretrained(path)


def _snapshot(out: Path, model: Any, head: Any, optimizer: Any, step: int) -> None:
    import torch

    state = {"model": model.state_dict(), "head": head.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    with replacing(out / "snapshot.pt") as partial:
        torch.save(state, partial)


def _restore(out: Path, model: Any, head: Any, optimizer: Any) -> int:
    import torch

    if not (out / "snapshot.pt").exists():
        return 0
    state = torch.load(out / "snapshot.pt", weights_only=True)
    model.load_state_dict(state["model"])
    head.load_state_dict(state["head"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="directory written by `lors synth`")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--early", type=int, default=2_200, help="also save the model after this many steps")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    corpus = load_corpus(options.corpus, languages=LANGUAGES, split="train")
    pretrain(
        corpus,
        options.out,
        steps=options.steps,
        early=options.early,
        size=Size(options.width, options.layers),
        seed=options.seed,
        cache=options.out / "features",
    )


if __name__ == "__main__":
    main()
