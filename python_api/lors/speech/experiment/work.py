"""What the stages of the experiment do: each fills its directory from those of the stages that it needs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.corpus import load_corpus
from ..data.left_out import SHARE, LeftOut
from ..data.utterance import Corpus
from ..scoring.evaluation import Decoder
from .config import Setting
from .criterion import CRITERIA, measured
from .merged import Merger, with_rest
from .variants import weights

__all__ = ["bounds", "finetune", "hear", "search", "synthesise", "test_merge", "test_model"]

_RESTS = ("task_arithmetic", "average", "base")

Inputs = Mapping[str, Path]


@dataclass(frozen=True)
class _Decoded:
    """Parameters of every stage that decodes a split: which utterances, and how."""

    data: Setting
    languages: Sequence[str]
    tasks: Sequence[str]
    batch_size: int
    device: str
    dtype: str = "float32"
    beams: int = 1
    normaliser: str = "whisper"
    left_out: LeftOut = field(default_factory=lambda: LeftOut(SHARE))

    def corpus(self, inputs: Inputs, split: str) -> Corpus:
        return _load(self.data, inputs, self.languages, split, self.left_out)

    def decoder(self, out: Path, network: Any, processor: Any) -> Decoder:
        return Decoder.of(
            network, processor, _features(out), self.batch_size, self.beams, left_out=self.left_out,
            normaliser=self.normaliser,
        )  # fmt: skip

    def model(self, out: Path, source: str | Path) -> Decoder:
        from ..model.whisper import load_model, load_processor

        return self.decoder(out, load_model(source, device=self.device, dtype=self.dtype), load_processor(source))

    def dev(self, inputs: Inputs, halving: Setting | None) -> dict[str, Corpus]:
        """The utterances of each round of a search: all of them in the last, before it a sample of as many as are said."""
        whole = {"dev": self.corpus(inputs, "dev")}
        if halving is None:
            return whole
        sampled = replace(self, data={**self.data, "dev": halving["dev"]}, left_out=LeftOut(SHARE))
        return {"first": sampled.corpus(inputs, "dev"), **whole}  # its rows count once, in the whole


def synthesise(
    out: Path, _: Inputs, *, experts: Sequence[str], languages: Sequence[str], sizes: Mapping[str, int],
    condition: str, seed: int,
) -> None:  # fmt: skip
    from ..data.synth import speak

    # Only the experts' languages need training speech.
    others = [language for language in languages if language not in experts]
    speak(out, [(experts, sizes), (others, {"test": sizes["test"]})], condition, seed, workers=2)


def finetune(
    out: Path, inputs: Inputs, *, base: str, data: Setting, languages: Sequence[str], tasks: Sequence[str],
    training: Setting, sequential: bool,
) -> None:  # fmt: skip
    from ..training.finetune import finetune
    from ..training.settings import Training

    finetune(
        base,
        out / "model",
        data=_load(data, inputs, languages, "train", LeftOut(SHARE)),
        dev=_load(data, inputs, languages, "dev", LeftOut(SHARE)) if training.get("eval_steps") else None,
        unusable=SHARE,
        languages=languages,
        tasks=tasks,
        training=Training(**training),
        sequential=sequential,
        cache=_features(out),
        force=True,
        progress=True,
    )


def test_model(out: Path, inputs: Inputs, *, model: str | None, **decoded: Any) -> None:
    """The answers of a model, or of the one that the stage needs."""
    how = _Decoded(**decoded)
    trained = next((path / "model" for name, path in inputs.items() if name != "corpus"), None)
    corpus = how.corpus(inputs, "test")
    _write_answers(out, how, how.model(out, str(trained) if model is None else model), corpus)


def bounds(
    out: Path, inputs: Inputs, *, base: str, criterion: str, experts: Sequence[Any], halving: Setting | None = None,
    **decoded: Any,
) -> None:  # fmt: skip
    """``bounds.json``: by round, the cells on dev of the base and of each language's own expert. experts: (stage, language,
    tasks)."""
    how, judge, found = _Decoded(**decoded), CRITERIA[criterion], {}
    for name, corpus in how.dev(inputs, halving).items():
        own: dict[str, float] = {}
        for stage, language, tasks in experts:
            own |= measured(judge, how.model(out, inputs[stage] / "model"), [_of(corpus, language)], tasks)
        found[name] = {"base": measured(judge, how.model(out, base), _parts(corpus), how.tasks), "own": own}
    how.left_out.require_few(out.name, len(corpus))  # the last round's, which is all of dev
    (out / "bounds.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def hear(
    out: Path, inputs: Inputs, *, base: str, data: Setting, experts: Sequence[Any], device: str, seed: int, gives: str,
    utterances: int, plus: bool, parts: str, steps: int,
) -> None:  # fmt: skip
    """Files of statistics, or ``settings.json``, from training recordings. experts: (stage, language, tasks)."""
    from ..calibration import calibrate
    from ..learning import Learning, learned_weights, settings_of

    left_out = LeftOut(SHARE)
    languages = {stage: language for stage, language, _ in experts}
    corpus = _load(data, inputs, list(dict.fromkeys(languages.values())), "train", left_out)
    models = {stage: str(inputs[stage] / "model") for stage in languages}
    if gives == "statistics":
        calibrate(
            base, models, out, data=corpus, languages=languages, limit=utterances, plus=plus, device=device,
            cache=_features(out), force=True,
        )  # fmt: skip
        return
    found = learned_weights(
        base, models, data=corpus, languages=languages, tasks={stage: tasks for stage, _, tasks in experts},
        how=Learning(parts, steps, seed=seed), home=_features(out), left_out=left_out, limit=utterances, device=device,
    )  # fmt: skip
    (out / "settings.json").write_text(json.dumps(settings_of(parts, found)) + "\n", "utf-8")


def _heard(inputs: Inputs, rest: str) -> Setting:
    """Settings of a merge by what it was given of recordings, if anything."""
    directory = next((path for name, path in inputs.items() if name.startswith("heard-")), None)
    if directory is None:
        return {}
    files = {path.name.removesuffix(".stats.safetensors"): str(path) for path in directory.glob("*.stats.safetensors")}
    if files:
        return {"statistics": files}
    return {**json.loads((directory / "settings.json").read_text("utf-8")), "rest": rest}


def search(
    out: Path, inputs: Inputs, *, base: str, method: str, settings: Sequence[Setting], rest: str, compare_rest: bool,
    criterion: str = "wer", halving: Setting | None = None, **decoded: Any,
) -> None:  # fmt: skip
    """``grid.json``: what the criterion says of every setting; the best is first in the list of ties.

    With `halving`, of all on a sample of dev, and the best of them are tried again on all of it.
    """
    how, judge = _Decoded(**decoded), CRITERIA[criterion]
    merger = Merger.load(base, inputs, how.device, how.dtype)
    decoder = how.decoder(out, merger.network, merger.processor)
    heard, rounds = _heard(inputs, rest), how.dev(inputs, halving)
    limits: dict[str, Any] = {name: {"base": {}, "own": {}} for name in rounds}
    if judge.relative:
        directory = next(path for name, path in inputs.items() if name.startswith("bounds-"))
        limits = json.loads((directory / "bounds.json").read_text("utf-8"))

    def tried(setting: Setting, name: str) -> Setting:
        path = out / f"{name}-{json.dumps(setting, sort_keys=True)}.json".replace("/", "_")
        if not path.exists():
            merger.holding(weights(merger, method, {**setting, **heard}))
            cells = measured(judge, decoder, _parts(rounds[name]), how.tasks)
            total = judge.total(cells, limits[name]["base"], limits[name]["own"])
            path.write_text(json.dumps({"setting": setting, criterion: total, "cells": cells}), "utf-8")
        return dict(json.loads(path.read_text("utf-8")))

    grid = [tried(with_rest(method, setting, rest), next(iter(rounds))) for setting in settings]
    leading = [grid[i] for i in judge.ranked([record[criterion] for record in grid])]
    found = {"grid": grid}
    if halving is not None:
        found["finalists"] = [tried(record["setting"], "dev") for record in leading[: halving["keep"]]]
        leading = [found["finalists"][i] for i in judge.ranked([record[criterion] for record in found["finalists"]])]
    best, others = leading[0], []
    if compare_rest and "rest" in best["setting"]:
        others = [tried({**best["setting"], "rest": r}, "dev") for r in _RESTS if r != rest]
    how.left_out.require_few(out.name, len(rounds["dev"]))
    (out / "grid.json").write_text(json.dumps({**found, "best": best, "rest": others}, indent=1) + "\n", "utf-8")


def test_merge(
    out: Path, inputs: Inputs, *, base: str, method: str, rest: str, check_reference: bool, **decoded: Any
) -> None:
    """The answers of the merge that dev chose."""
    how = _Decoded(**decoded)
    merger = Merger.load(base, inputs, how.device, how.dtype)
    chosen = next(path for name, path in inputs.items() if name.startswith("dev-"))
    setting = with_rest(method, json.loads((chosen / "grid.json").read_text("utf-8"))["best"]["setting"], rest)
    setting |= _heard(inputs, rest)
    corpus = how.corpus(inputs, "test")
    decoder = how.decoder(out, merger.network, merger.processor)
    merger.holding(weights(merger, method, setting))
    answers = _write_answers(out, how, decoder, corpus)
    if check_reference:
        merger.holding(weights(merger, method, setting, backend="reference"))
        again = _write_answers(out / "reference", how, decoder, corpus)
        differing = sum(a != b for a, b in zip(answers, again, strict=True))
        record = {"utterances": len(answers), "differing": differing}
        (out / "reference.json").write_text(json.dumps(record) + "\n", "utf-8")


def _of(corpus: Corpus, language: str) -> Corpus:
    return [u for u in corpus if u.language == language]


def _parts(corpus: Corpus) -> Iterator[Corpus]:
    """The utterances of each language."""
    return (_of(corpus, language) for language in dict.fromkeys(u.language for u in corpus))


def _load(data: Setting, inputs: Inputs, languages: Sequence[str], split: str, left_out: LeftOut) -> Corpus:
    return load_corpus(
        inputs.get("corpus", data["source"]),
        languages=languages,
        split=split,
        limit=data[split],
        max_seconds=data["max_seconds"],
        seed=data.get("sample_seed", 0),
        left_out=left_out,
    )


def _write_answers(out: Path, how: _Decoded, decoder: Decoder, corpus: Corpus) -> list[str]:
    """``answers.jsonl``: every answer and what its scores are sums of; ``scores.json``; ``left_out.json``. Returns the answers."""
    out.mkdir(exist_ok=True)
    scores, lines = [], []
    speakers = {u.id: u.speaker for u in corpus if u.speaker is not None}
    results = [r for part in _parts(corpus) for r in decoder.results("", part, how.tasks)]
    for r in sorted(results, key=lambda result: how.tasks.index(result.task)):
        task = r.task
        scores.append({"task": task, "language": r.language, **asdict(r.score), "real_time_factor": r.real_time_factor})
        for i, answer in enumerate(r.answers):
            bleu = None if r.statistics.bleu is None else r.statistics.bleu[i].tolist()
            counted: dict[str, Any] = {
                "errors": int(r.statistics.errors[i]),
                "words": int(r.statistics.words[i]),
                "bleu": bleu,
            }
            said = {"speaker": speakers[answer.id]} if answer.id in speakers else {}
            lines.append({"task": task, "language": r.language, **asdict(answer), **counted, **said})
    decoder.left_out.require_few(out.name, len(corpus))
    with (out / "answers.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", "utf-8")
    (out / "left_out.json").write_text(json.dumps(asdict(decoder.left_out), indent=1) + "\n", "utf-8")
    return [line["hypothesis"] for line in lines]


def _features(out: Path) -> Path:
    """The directory of features that all stages share."""
    return next(parent for parent in out.parents if parent.name == "stages").parent / "features"
