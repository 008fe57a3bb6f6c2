"""Models x languages x tasks -> scores, and every single answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import LorsError
from ...files.file import write_file
from ...files.replaceable import ANSWERS, SCORES, require_file
from ...files.writing import writing
from ...progress import bar
from ..data.audio import SAMPLE_RATE, duration
from ..data.corpus import load_corpus
from ..data.features import features
from ..data.languages import parse_languages
from ..data.utterance import Corpus, Utterance, by_task, parse_tasks
from ..model.whisper import DTYPES, load_model, load_processor, quiet, require_languages, torch_device
from .metrics import Interval, Score, Statistics, paired_bootstrap, score

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Answer", "Evaluation", "Result", "compare", "evaluate", "make_room", "model_names", "result", "transcribe"]

_CHUNK = 1024  # utterances whose features are held at once when there is no cache


@dataclass(frozen=True, slots=True)
class Answer:
    """One decoded utterance."""

    id: str
    reference: str
    hypothesis: str


@dataclass(frozen=True, slots=True)
class Result:
    """One model, language and task."""

    model: str
    language: str
    task: str
    score: Score
    statistics: Statistics
    answers: tuple[Answer, ...]
    audio_seconds: float
    decode_seconds: float

    @property
    def real_time_factor(self) -> float:
        """Seconds of decoding per second of audio; features are not counted."""
        return self.decode_seconds / self.audio_seconds


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All results, in the order models, tasks, languages."""

    results: tuple[Result, ...]

    def select(self, model: str, task: str) -> dict[str, Result]:
        """Language -> result."""
        return {r.language: r for r in self.results if r.model == model and r.task == task}

    def rows(self) -> list[dict[str, Any]]:
        """Model, language, task and the scores of each result, as plain data."""
        return [
            {"model": r.model, "language": r.language, "task": r.task, **asdict(r.score),
             "real_time_factor": r.real_time_factor}
            for r in self.results
        ]  # fmt: skip

    def write(self, out: Path) -> None:
        """``scores.json``, and ``answers/<model>.<task>.<language>.jsonl`` with one line per utterance.

        LorsError when `out` cannot be written.
        """
        make_room(out)
        for r in self.results:
            counts = zip(r.answers, r.statistics.errors, r.statistics.words, strict=True)
            lines = [{**asdict(answer), "errors": int(errors), "words": int(words)} for answer, errors, words in counts]
            name = f"{r.model.replace('/', '--')}.{r.task}.{r.language}.jsonl"
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_file(out / "answers" / name, text, ANSWERS)
        write_file(out / "scores.json", json.dumps(self.rows(), indent=1, ensure_ascii=False) + "\n", SCORES)


def make_room(out: Path) -> None:
    """Creates the directory that `Evaluation.write` fills; LorsError when it cannot be, or has scores of another kind."""
    require_file(out / "scores.json", SCORES, force=True)
    with writing(out):
        (out / "answers").mkdir(parents=True, exist_ok=True)


def evaluate(
    models: str | Path | Sequence[str | Path],
    *,
    data: str | Path | Corpus,
    languages: str | Iterable[str],
    tasks: str | Sequence[str] = ("transcribe",),
    split: str = "test",
    limit: int | None = None,
    max_seconds: float | None = None,
    batch_size: int = 64,
    beams: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    cache: Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Decodes `data` with every model, for every language and task, and scores the answers (`scoring`).

    `data` as for `load_corpus`, like `split` (of a corpus loaded before: all), `limit` (utterances per language) and
    `max_seconds`; `languages` and `tasks` are sequences or text with commas. Decoding is greedy, or by `beams` beams,
    without timestamps, `batch_size` utterances at a time in `dtype` (float32, float16, bfloat16); neither `batch_size`
    nor `cache`, a directory that keeps features, changes a word in float32. Models are called by the name of their
    directory, or their path where two names agree. `progress`: a bar on stderr where that is a terminal.

    LorsError, before any decoding, for a model, language, task or device that is not there; a recording that cannot be
    read is met when its turn comes.
    """
    quiet()
    if dtype not in DTYPES:
        raise LorsError(f"dtype: expected {', '.join(DTYPES)}, got {dtype!r}")
    torch_device(device)
    sources = [models] if isinstance(models, (str, Path)) else list(models)
    names, wanted, chosen = model_names(sources), parse_languages(languages), parse_tasks(tasks)
    for source in sources:
        require_languages(source, wanted)  # the last model's mistakes before the first one's hours
    chosen_split = None if isinstance(data, list) else split
    corpus = load_corpus(data, languages=wanted, split=chosen_split, limit=limit, max_seconds=max_seconds)
    parts = {(task, language): _part(corpus, task, language) for task in chosen for language in wanted}
    results = []
    total = len(sources) * sum(len(part) for part in parts.values())
    with bar("decoding", total, quiet=not progress) as advance:
        done = 0

        def decoded(count: int) -> None:
            nonlocal done
            done += count
            if advance is not None:
                advance(done, total)

        for name, source in zip(names, sources, strict=True):
            processor, model = load_processor(source), load_model(source, device=device, dtype=dtype)
            for (task, _), part in parts.items():
                results.append(result(name, model, processor, part, task, batch_size, beams, cache, decoded))
    return Evaluation(tuple(results))


def _part(corpus: Corpus, task: str, language: str) -> Corpus:
    part = by_task((u for u in corpus if u.language == language), task)
    if not part:
        raise LorsError(f"{task} {language}: expected utterances with a reference, got none")
    return part


def model_names(sources: Sequence[str | Path]) -> list[str]:
    """What the models are called in results; LorsError when one is there twice."""
    short = [Path(source).name for source in sources]
    if len(set(short)) == len(short):
        return short
    names = [str(source) for source in sources]
    if len(set(names)) != len(names):
        raise LorsError(f"evaluate: expected models that differ, got {', '.join(names)}")
    return names


def result(
    name: str,
    model: Any,
    processor: Any,
    part: Corpus,
    task: str,
    batch_size: int,
    beams: int,
    cache: Path | None,
    advance: Callable[[int], None] | None = None,
) -> Result:
    """Decodes and scores utterances of one language (`part`) for one task."""
    language = part[0].language
    hypotheses, seconds = [], 0.0
    step = len(part) if cache is not None else _CHUNK
    for start in range(0, len(part), step):
        chunk = part[start : start + step]
        mel = features(chunk, processor.feature_extractor, cache)
        began = time.perf_counter()
        hypotheses += transcribe(
            model, processor, mel, language, task, batch_size=batch_size, beams=beams, advance=advance
        )
        seconds += time.perf_counter() - began
    references = [u.reference(task) or "" for u in part]
    target = language if task == "transcribe" else "en"
    summary, statistics = score(references, hypotheses, language=target, task=task)
    answers = tuple(Answer(u.id, r, h) for u, r, h in zip(part, references, hypotheses, strict=True))
    return Result(name, language, task, summary, statistics, answers, _audio_seconds(part), seconds)


def _audio_seconds(part: Sequence[Utterance]) -> float:
    return max(sum(duration(u.audio) for u in part), 1 / SAMPLE_RATE)


def transcribe(
    model: Any,
    processor: Any,
    mel: NDArray[np.float16],
    language: str,
    task: str,
    *,
    batch_size: int = 64,
    beams: int = 1,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """mel [n, bins, frames] -> n texts; `advance` is told the size of each batch that is done."""
    import torch

    texts: list[str] = []
    with torch.inference_mode():
        for start in range(0, len(mel), batch_size):
            batch = torch.tensor(mel[start : start + batch_size]).to(model.device, model.dtype)
            tokens = model.generate(
                batch,
                attention_mask=torch.ones(batch.shape[0], batch.shape[2], dtype=torch.long, device=model.device),
                language=language,
                task=task,
                num_beams=beams,
            )
            texts += processor.batch_decode(tokens, skip_special_tokens=True)
            if advance is not None:
                advance(len(batch))
    return [text.strip() for text in texts]


def compare(evaluation: Evaluation, first: str, second: str, *, task: str, metric: str) -> Interval:
    """Paired bootstrap between two of the models: mean over languages of the metric, first minus second."""
    sides = [{k: r.statistics for k, r in evaluation.select(model, task).items()} for model in (first, second)]
    for model, side in zip((first, second), sides, strict=True):
        if not side:
            known = dict.fromkeys(r.model for r in evaluation.results)
            raise LorsError(f"compare: no results of {model!r} for {task}; evaluated: {', '.join(known)}")
    return paired_bootstrap([sides[0]], [sides[1]], metric)
