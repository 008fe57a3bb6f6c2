"""Models x languages x tasks -> scores, and every single answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import LorsError
from ...files.file import write_file
from ...files.replaceable import ANSWERS, LEFT_OUT, SCORES, require_file
from ...files.writing import writing
from ...progress import bar
from ..data.audio import SAMPLE_RATE, duration
from ..data.corpus import load_corpus, name_of
from ..data.features import LONG_FORM, Features, kept_in
from ..data.languages import parse_languages
from ..data.left_out import SHARE, LeftOut
from ..data.loading import load_in_order, workers_for
from ..data.utterance import Corpus, by_task, parse_tasks
from ..model.tokens import language_token
from ..model.whisper import DTYPES, has_times, load_model, load_processor, quiet, require_languages, torch_device
from .metrics import NORMALISERS, Interval, Score, Statistics, numbered, paired_bootstrap, score

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Answer", "Decoder", "Evaluation", "Result", "compare", "evaluate", "make_room", "model_names"]

# Whisper's own algorithm for recordings beyond the window: a window where the last one's times end, and again at a higher
# temperature where the answer repeats itself or is improbable. Thresholds are those of the paper; 1.35 is 2.4 by tokens.
_WINDOWS: dict[str, Any] = {
    "return_timestamps": True,
    "return_segments": True,
    "condition_on_prev_tokens": False,
    "temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    "compression_ratio_threshold": 1.35,
    "logprob_threshold": -1.0,
    "no_speech_threshold": 0.6,
}


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
    """All results, in the order models, tasks, languages, and what of the corpus they are without."""

    results: tuple[Result, ...]
    left_out: LeftOut = field(default_factory=LeftOut)

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
        """``scores.json``, ``left_out.json``, and ``answers/<model>.<task>.<language>.jsonl`` with one line per utterance.

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
        write_file(
            out / "left_out.json", json.dumps(asdict(self.left_out), indent=1, ensure_ascii=False) + "\n", LEFT_OUT
        )


def make_room(out: Path) -> None:
    """Creates the directory that `Evaluation.write` fills; LorsError when it cannot be, or has scores of another kind."""
    require_file(out / "scores.json", SCORES, force=True)
    require_file(out / "left_out.json", LEFT_OUT, force=True)
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
    cache: str | Path | None = None,
    workers: int | None = None,
    sample_seed: int = 0,
    unusable: float = SHARE,
    normaliser: str = "whisper",
    progress: bool = False,
) -> Evaluation:
    """Decodes `data` with every model, for every language and task, and scores the answers (`scoring`).

    `data` as for `load_corpus`, like `split` (of a corpus loaded before: all), `limit` (utterances per language, a sample
    by `sample_seed`) and `max_seconds`; `languages` and `tasks` are sequences or text with commas. Decoding is greedy, or by
    `beams` beams, without timestamps, `batch_size` utterances of like length at a time in `dtype` (float32, float16,
    bfloat16); recordings beyond the model's window, up to an hour, one at a time by Whisper's long-form algorithm; features are computed by `workers` processes (None: none, and up to 8 for a GPU). Neither `batch_size` nor
    `workers` nor `cache`, a directory that keeps features (`Features`; None: one for this call), changes a word in float32.
    `normaliser` as in `metrics`: Whisper's, or "marks". Models are called by the name of their directory, or their path where two names agree. `progress`: a bar on stderr where
    that is a terminal.

    Rows and recordings that cannot be used, and with them their utterances of every model, are left out and listed in the
    result, up to a share of `unusable`.

    LorsError, before any decoding, for a model, language, task or device that is not there; and for more unusable recordings,
    which may be met when their turn comes.
    """
    quiet()
    if dtype not in DTYPES:
        raise LorsError(f"dtype: expected {', '.join(DTYPES)}, got {dtype!r}")
    if normaliser not in NORMALISERS:
        raise LorsError(f"normaliser: expected {' or '.join(NORMALISERS)}, got {normaliser!r}")
    torch_device(device)
    sources = [models] if isinstance(models, (str, Path)) else list(models)
    names, wanted, chosen = model_names(sources), parse_languages(languages), parse_tasks(tasks)
    for source in sources:
        require_languages(source, wanted)  # the last model's mistakes before the first one's hours
    chosen_split = None if isinstance(data, list) else split
    left_out = LeftOut(unusable)
    corpus = load_corpus(
        data, languages=wanted, split=chosen_split, limit=limit, max_seconds=max_seconds, seed=sample_seed, left_out=left_out
    )  # fmt: skip
    parts = {language: [u for u in corpus if u.language == language] for language in wanted}
    total = len(sources) * sum(
        _require_references(part, task, language) for task in chosen for language, part in parts.items()
    )
    results = []
    with bar("decoding", total, quiet=not progress) as advance, kept_in(cache) as home:
        done = 0

        def decoded(count: int) -> None:
            nonlocal done
            done += count
            if advance is not None:
                advance(done, total)

        for name, source in zip(names, sources, strict=True):
            model = load_model(source, device=device, dtype=dtype)
            decoder = Decoder.of(model, load_processor(source), home, batch_size, beams, workers, left_out, normaliser)
            found = []
            for part in parts.values():
                found += decoder.results(name, part, chosen, decoded)
                left_out.require_few(name_of(data), len(corpus))
            results += sorted(
                found, key=lambda result: chosen.index(result.task)
            )  # stable: languages stay in their order
    return Evaluation(tuple(results), left_out)


def _require_references(part: Corpus, task: str, language: str) -> int:
    """How many utterances have one; LorsError for none."""
    if not (count := len(by_task(part, task))):
        raise LorsError(f"{task} {language}: expected utterances with a reference, got none")
    return count


def model_names(sources: Sequence[str | Path]) -> list[str]:
    """What the models are called in results; LorsError when one is there twice."""
    short = [Path(source).name for source in sources]
    if len(set(short)) == len(short):
        return short
    names = [str(source) for source in sources]
    if len(set(names)) != len(names):
        raise LorsError(f"evaluate: expected models that differ, got {', '.join(names)}")
    return names


@dataclass(slots=True)
class Transcribed:
    """A text for each utterance, None where the recording cannot be read; and seconds of decoding, the encoder's included."""

    texts: list[str | None]
    seconds: float = 0.0

    def add(self, rows: Sequence[int], texts: Sequence[str], seconds: float) -> None:
        for row, text in zip(rows, texts, strict=True):
            self.texts[row] = text.strip()
        self.seconds += seconds


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model with all that decoding by it takes. What cannot be read goes to `left_out`."""

    model: Any
    tokenizer: Any
    features: Features
    batch_size: int = 64
    beams: int = 1
    workers: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    normaliser: str = "whisper"

    @classmethod
    def of(
        cls,
        model: Any,
        processor: Any,
        home: str | Path,
        batch_size: int = 64,
        beams: int = 1,
        workers: int | None = None,
        left_out: LeftOut | None = None,
        normaliser: str = "whisper",
    ) -> Decoder:
        """home: of the features; workers None: as many as `workers_for` says. Recordings beyond the model's window are
        decoded by a model that has tokens for times."""
        longest = LONG_FORM if has_times(model) else 0.0
        features = Features(processor.feature_extractor, home, longest=longest)
        count = workers_for(model.device.type) if workers is None else workers
        return cls(model, processor.tokenizer, features, batch_size, beams, count, left_out or LeftOut(), normaliser)

    def results(
        self, name: str, corpus: Corpus, tasks: Sequence[str], advance: Callable[[int], None] | None = None
    ) -> list[Result]:
        """Decodes and scores, for each task, the utterances of one language that have a reference for it."""
        parts = {task: by_task(corpus, task) for task in tasks}
        if all(part == corpus for part in parts.values()):
            said = self.transcribe(corpus, tasks, advance)
        else:
            said = {task: self.transcribe(part, [task], advance)[task] for task, part in parts.items()}
        return [self._scored(name, part, task, said[task]) for task, part in parts.items()]

    def _scored(self, name: str, part: Corpus, task: str, transcribed: Transcribed) -> Result:
        language = part[0].language
        read = [(u, said) for u, said in zip(part, transcribed.texts, strict=True) if said is not None]
        if not read:
            raise LorsError(
                f"{task} {language}: expected recordings that can be read, got {self.left_out.unusable[-1]}"
            )
        answers = tuple(Answer(u.id, u.reference(task) or "", said) for u, said in read)
        target = language if task == "transcribe" else "en"
        summary, statistics = score(
            [a.reference for a in answers], [a.hypothesis for a in answers], language=target, task=task,
            kind=self.normaliser,
        )  # fmt: skip
        statistics = replace(statistics, speakers=numbered([u.speaker for u, _ in read]))
        audio = max(sum(duration(u.audio) for u, _ in read), 1 / SAMPLE_RATE)
        return Result(name, language, task, summary, statistics, answers, audio, transcribed.seconds)

    def transcribe(
        self, part: Corpus, tasks: Sequence[str], advance: Callable[[int], None] | None = None
    ) -> dict[str, Transcribed]:
        """By task, what the model says for the utterances of one language. What the encoder makes of a batch is made once, for
        all tasks.

        advance: told the size of each batch that is done, times the tasks.
        """
        said = {task: Transcribed([None] * len(part)) for task in tasks}
        for batch in load_in_order(part, self.features, self.batch_size, self.workers):
            self.left_out.note(batch.unusable)
            for rows, mel in batch.parts:
                long = mel.shape[2] > self.features.extractor.nb_max_frames
                for task, texts, seconds in (self._long if long else self._short)(mel, part[0].language, tasks):
                    said[task].add(rows, texts, seconds)
            if advance is not None:
                advance(len(tasks) * (sum(len(rows) for rows, _ in batch.parts) + len(batch.unusable)))
        return said

    def _short(self, features: Tensor, language: str, tasks: Sequence[str]) -> Iterator[tuple[str, list[str], float]]:
        """(task, texts, seconds, those of the encoder included) of recordings within the model's window."""
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        began, model = time.perf_counter(), self.model
        mel = features.to(model.device, model.dtype)
        mask = torch.ones(mel.shape[0], mel.shape[2], dtype=torch.long, device=model.device)
        with torch.inference_mode():
            encoded = model.get_encoder()(mel).last_hidden_state
        shared = time.perf_counter() - began
        for task in tasks:
            began = time.perf_counter()
            with torch.inference_mode():
                heard = BaseModelOutput(last_hidden_state=encoded)  # generating changes it
                tokens = model.generate(encoder_outputs=heard, attention_mask=mask, **self._asked(language, task))
            yield task, self._texts(tokens), shared + time.perf_counter() - began

    def _long(self, features: Tensor, language: str, tasks: Sequence[str]) -> Iterator[tuple[str, list[str], float]]:
        """The same of one recording beyond it."""
        import torch

        model = self.model
        mel = features.to(model.device, model.dtype)
        mask = torch.ones(mel.shape[0], mel.shape[2], dtype=torch.long, device=model.device)
        for task in tasks:
            began = time.perf_counter()
            with torch.inference_mode(), torch.random.fork_rng():
                torch.manual_seed(0)  # of the fallback, for one recording at a time: the same words whatever the order
                found = model.generate(mel, attention_mask=mask, **self._asked(language, task), **_WINDOWS)
            said = (text.strip() for text in self._texts([part["tokens"].tolist() for part in found["segments"][0]]))
            # Whisper begins a segment with a space, others need not
            yield task, [" ".join(text for text in said if text)], time.perf_counter() - began

    def _asked(self, language: str, task: str) -> dict[str, Any]:
        return {"language": language_token(language), "task": task, "num_beams": self.beams}

    def _texts(self, tokens: Any) -> list[str]:
        return list(self.tokenizer.batch_decode(tokens, skip_special_tokens=True))


def compare(evaluation: Evaluation, first: str, second: str, *, task: str, metric: str) -> Interval:
    """Paired bootstrap between two of the models: mean over languages of the metric, first minus second."""
    sides = [{k: r.statistics for k, r in evaluation.select(model, task).items()} for model in (first, second)]
    for model, side in zip((first, second), sides, strict=True):
        if not side:
            known = dict.fromkeys(r.model for r in evaluation.results)
            raise LorsError(f"compare: no results of {model!r} for {task}; evaluated: {', '.join(known)}")
    return paired_bootstrap([sides[0]], [sides[1]], metric)
