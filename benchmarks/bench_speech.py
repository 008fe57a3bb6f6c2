"""Speech: `evaluate` on 1,000 utterances, and `finetune` against a bare training loop, on one thread.

Targets: 1,000 utterances of two seconds evaluated in under 10 s (wall time; model loading, cached features, decoding and
scoring), and training at 90 % or more of the throughput of a bare loop (processor time, so that a busy machine does not
change the ratio). A training step's time is the difference of a long and a short run, so loading and saving cancel.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .results import Results

_UTTERANCES = 1000
_BATCH = 16
_SHORT, _LONG = 10, 60  # steps


def run(results: Results, repeats: int) -> None:
    import torch

    torch.set_num_threads(1)
    pieces = results.record("evaluation", evaluation), results.record("training", partial(training, repeats))
    for name, value in {**pieces[0], **pieces[1]}.items():
        print(f"  {name}: {value:.4g}" if isinstance(value, float) else f"  {name}: {value}", flush=True)


def evaluation() -> dict[str, Any]:
    """Seconds of `evaluate` on 1,000 two-second utterances with cached features, and of its decoding alone."""
    from lors.speech.data.corpus import load_corpus
    from lors.speech.demo import RECORDINGS
    from lors.speech.scoring.evaluation import evaluate

    spoken = load_corpus(RECORDINGS, languages="ca", split="train")
    corpus = [replace(u, id=f"{u.id}-{copy}") for copy in range(_UTTERANCES // len(spoken)) for u in spoken]
    with tempfile.TemporaryDirectory() as scratch:

        def run() -> float:
            return evaluate("tiny", data=corpus, languages="ca", cache=Path(scratch)).results[0].decode_seconds

        run()  # fills the cache of features
        decoding: list[float] = []
        cpu, wall = _timed(lambda: decoding.append(run()))
    return {
        "utterances": len(corpus),
        "evaluation_cpu_seconds": cpu,
        "evaluation_wall_seconds": wall,
        "decoding_wall_seconds": decoding[0],
    }


def training(repeats: int) -> dict[str, Any]:
    """Processor milliseconds of one step of 16 utterances in `finetune` and in a bare loop, the best of a few each."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = [_step(lambda steps: _finetune(Path(scratch), steps)) for _ in range(repeats)]
        bare = [_step(lambda steps: _bare(Path(scratch), steps)) for _ in range(repeats)]
    return {
        "finetune_ms_per_step": 1e3 * min(trainer),
        "bare_loop_ms_per_step": 1e3 * min(bare),
        "throughput_of_bare_loop": min(bare) / min(trainer),
    }


def _step(run: Callable[[int], None]) -> float:
    run(_SHORT)
    return (_timed(lambda: run(_LONG))[0] - _timed(lambda: run(_SHORT))[0]) / (_LONG - _SHORT)


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def _finetune(scratch: Path, steps: int) -> None:
    from lors.speech.demo import RECORDINGS
    from lors.speech.training.finetune import finetune
    from lors.speech.training.settings import Training

    settings = Training(max_steps=steps, per_device_train_batch_size=_BATCH, learning_rate=1e-4)
    finetune("tiny", scratch / "out", data=RECORDINGS, languages="ca", training=settings, cache=scratch, force=True)


def _bare(scratch: Path, steps: int) -> None:
    """The least that trains the same way: batches, loss, gradients, clipping, AdamW, schedule."""
    import numpy as np
    import torch

    from lors.speech.data.corpus import load_corpus
    from lors.speech.data.features import Features
    from lors.speech.demo import RECORDINGS
    from lors.speech.model.tokens import labels
    from lors.speech.model.whisper import load_model, load_processor

    model, processor = load_model("tiny").train(), load_processor("tiny")
    corpus = load_corpus(RECORDINGS, languages="ca", split="train")
    features = Features(processor.feature_extractor, scratch)
    mel = torch.tensor(np.stack([features.of(utterance.audio) for utterance in corpus]))
    targets = [torch.tensor(labels(processor.tokenizer, u, "transcribe")) for u in corpus]
    parameters = [p for n, p in model.named_parameters() if "encoder.embed_positions" not in n]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    rng = random.Random(0)
    for _ in range(steps):
        rows = rng.sample(range(len(corpus)), _BATCH)
        batch = torch.nn.utils.rnn.pad_sequence([targets[i] for i in rows], batch_first=True, padding_value=-100)
        loss = model(input_features=mel[rows].float(), labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
