"""Speech: `evaluate` on 1,000 utterances, `finetune` against a bare training loop, on one thread, and loading.

Targets: 1,000 utterances of two seconds evaluated in under 10 s (wall time; model loading, cached features, decoding and
scoring), and training at 90 % or more of the throughput of a bare loop (processor time, so that a busy machine does not
change the ratio). A training step's time is the difference of a long and a short run, so loading and saving cancel.

Loading: MP3 of 48 kHz and 5 s to features of Whisper's own size, by 0, 1 and 2 worker processes, alone and ahead of a model
step that is stood in for by waiting, as for a GPU: 50 utterances a second. Target: 95 % of that with two workers.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from statistics import median
from typing import Any

from .results import Results

_UTTERANCES = 1000
_BATCH = 16
_SHORT, _LONG = 10, 60  # steps
_MODEL = 50  # utterances a second of the model that is stood in for
_RATE, _SECONDS = 48000, 5


def run(results: Results, repeats: int) -> None:
    import torch

    torch.set_num_threads(1)
    pieces = (
        results.record("evaluation", evaluation),
        results.record("training", partial(training, repeats)),
        results.record("loading", partial(loading, 6 if results.quick else 24, repeats)),
    )
    for name, value in {name: value for piece in pieces for name, value in piece.items()}.items():
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


def loading(batches: int, repeats: int) -> dict[str, Any]:
    """Utterances a second by workers, alone and ahead of the stand-in; memory over the whole of all processes; the cache.

    Medians of interleaved repeats, from the first batch to the last. Memory: what is shared counts once (Pss), sampled at each
    batch, for one pass and for one four times as long. The cache's bound is a third of what it is asked to keep.
    """
    from transformers import WhisperFeatureExtractor

    from lors.speech.data.features import Features

    extractor = WhisperFeatureExtractor()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = _clips(Path(scratch), batches * _BATCH)
        nothing_kept = Features(extractor, Path(scratch) / "none", bound=0)
        rates: dict[str, list[float]] = {}
        for _ in range(repeats):
            for workers in (0, 1, 2):
                for step, name in ((0.0, "alone"), (_BATCH / _MODEL, "ahead_of_the_model")):
                    measured = _pass(corpus, nothing_kept, workers, step)
                    rates.setdefault(f"utterances_per_second_{workers}_workers_{name}", []).append(measured[0])
        found: dict[str, Any] = {name: median(values) for name, values in rates.items()}
        found["share_of_the_model_2_workers"] = found["utterances_per_second_2_workers_ahead_of_the_model"] / _MODEL
        for times in (1, 4):
            copies = [replace(u, id=f"{u.id}-{copy}") for copy in range(times) for u in corpus]
            found[f"peak_megabytes_2_workers_{len(copies)}_utterances"] = _pass(copies, nothing_kept, 2, 0.0)[1] / 1e6
        whole = _filled(corpus, Features(extractor, Path(scratch) / "whole"))
        found["cache_megabytes_unbounded"] = whole / 1e6
        found["cache_megabytes_bound"] = whole / 3e6
        found["cache_megabytes_held"] = _filled(corpus, Features(extractor, Path(scratch) / "cache", whole // 3)) / 1e6
    return found


def _clips(home: Path, count: int) -> list[Any]:
    """Utterances, each a recording of its own: noise of the loudness of speech, as Common Voice stores it."""
    import numpy as np
    import soundfile

    from lors.speech.data.audio import AudioFile
    from lors.speech.data.utterance import Utterance

    generator = np.random.default_rng(0)
    for i in range(count):
        samples = 0.1 * generator.standard_normal(_RATE * _SECONDS, np.float32)
        soundfile.write(home / f"{i}.mp3", samples, _RATE, format="MP3")
    return [Utterance(f"{i}", AudioFile(home / f"{i}.mp3"), "", None, "en") for i in range(count)]


def _pass(corpus: Any, features: Any, workers: int, step: float) -> tuple[float, int]:
    """(utterances a second after the first batch, most bytes of memory of all processes)."""
    from lors.speech.data.loading import load_in_order

    memory, done, times = 0, -_BATCH, list[float]()
    for batch in load_in_order(corpus, features, _BATCH, workers):
        times.append(time.perf_counter())
        done += sum(len(rows) for rows, _ in batch.parts)
        memory = max(memory, sum(map(_bytes, [os.getpid(), *(child.pid or 0 for child in active_children())])))
        time.sleep(step)
    return done / (times[-1] - times[0]), memory


def _bytes(pid: int) -> int:
    """Memory of a process, where what it shares with others is divided among them (Linux)."""
    fields = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines())
    return next(int(field[1]) * 1024 for field in fields if field[0] == "Pss:")


def _filled(corpus: Any, features: Any) -> int:
    """Bytes that the cache holds after it was asked for all of the corpus."""
    for utterance in corpus:
        features.of(utterance.audio)
    return int(features.held())


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
