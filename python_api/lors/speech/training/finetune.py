"""Fine-tuning Whisper: experts, the multi-task model, sequential training; each a run of `trainer`, or several.

Here are the settings, which utterances are trained on, and the directories: a run that was killed continues from its
checkpoints when the same call is made again, and the result appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import LorsError, SettingError
from ...files.digest import sha256_file
from ...files.directory import OutputDirectory
from ...files.replaceable import CHECKPOINTS, RUN, foreign, require_file
from ...files.writing import writing
from ...public import public
from ..data.corpus import load_corpus, name_of
from ..data.languages import parse_languages
from ..data.left_out import SHARE, LeftOut
from ..data.utterance import Corpus, parse_tasks
from ..model.whisper import local_model, quiet, require_languages, torch_device
from .settings import Training, write_json

if TYPE_CHECKING:
    from .trainer import Job, Record

__all__ = ["Trained", "finetune", "first_process"]


@dataclass(frozen=True, slots=True)
class Trained:
    """What a fine-tuning run did; for sequential training the sums over the languages, or what the last one says."""

    path: Path
    languages: tuple[str, ...]
    tasks: tuple[str, ...]
    items: int  # utterances times tasks
    skipped: int  # references longer than the decoder
    steps: int  # of the optimiser, those before a kill too
    resumed_from: int  # step of the checkpoint it continued from, 0 for none
    train_loss: float | None  # cross-entropy, nats, mean over all tokens since `resumed_from`; None: no step
    dev_wer: float | None  # percent, mean over languages and tasks; None when it was not measured
    longer: int  # recordings left out, longer than `max_seconds`
    unusable: tuple[str, ...]  # a line for each row or recording that could not be used
    seconds: float  # of this run, reading and saving included


def finetune(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path | Corpus,
    languages: str | Iterable[str],
    tasks: str | Sequence[str] = ("transcribe",),
    training: Training | None = None,
    dev: str | Path | Corpus | None = None,
    limit: int | None = None,
    max_seconds: float | None = None,
    sample_seed: int = 0,
    unusable: float = SHARE,
    sequential: bool = False,
    cache: str | Path | None = None,
    force: bool = False,
    progress: bool = False,
) -> Trained:
    """Minimises the cross-entropy of the references over all `languages` and `tasks` mixed; writes the model to `out`.

    One language gives an expert, several a multi-task model; `sequential` trains one language after another instead,
    `training.max_steps` each, from the weights the one before left. `data` (for the values see `load_corpus`) is read
    in its split "train", and in "dev" with `training.eval_steps`, there from `dev` where that is given; `limit` is
    utterances per language of "train", a sample by `sample_seed`; `max_seconds` drops longer recordings of both. A reference
    that is empty is not trained on. Rows and recordings that cannot be used are left out and listed, up to a share of
    `unusable`. `cache`: a directory that keeps features (`Features`); else they stand beside the checkpoints. `progress`:
    lines, and on a terminal a bar, on stderr.

    What `training.report_to` TensorBoard is told stays in ``OUT.runs``. Checkpoints stand in ``OUT.checkpoints`` until the end; the same call continues from the last complete one, to the
    weights of a run that was not cut. Started by torchrun or ``accelerate launch`` the processes share the work; else one
    device is used. A step is per_device_train_batch_size x gradient_accumulation_steps x processes utterances, and its loss
    the mean over their tokens, however it is divided.

    LorsError, before any training, for a model, corpus, language, task or device that is not there, an `out` that is
    (unless `force`), checkpoints of another run; and for a disk that is full.
    """
    from .trainer import Job

    quiet()
    training, wanted, chosen = training or Training(), parse_languages(languages), parse_tasks(tasks)
    torch_device(training.device)
    training.require_packages()
    if training.metric_for_best_model == "bleu" and (training.eval_steps is None or "translate" not in chosen):
        raise SettingError(
            "metric_for_best_model", "bleu is of translation on dev: expected the task translate and eval_steps"
        )
    if training.metric_for_best_model == "loss" and training.eval_steps is None:
        raise SettingError("metric_for_best_model", "loss is that of dev: expected eval_steps, got none")
    require_languages(model, wanted)
    left_out = LeftOut(unusable)
    corpus = load_corpus(
        data, languages=wanted, split="train", limit=limit, max_seconds=max_seconds, seed=sample_seed, left_out=left_out
    )
    held_out: Corpus = []
    if training.eval_steps is not None:
        source = data if dev is None else dev
        held_out = load_corpus(source, languages=wanted, split="dev", max_seconds=max_seconds, left_out=left_out)
    out = Path(out)
    scratch = out.absolute().with_name(f"{out.name}.checkpoints")  # checkpoints hold the path of the best one
    features = scratch / "features" if cache is None else Path(cache)
    groups = [(language,) for language in wanted] if sequential else [wanted]
    records, start = [], str(model)
    identity = _identity(model, corpus, held_out, wanted, chosen, training, sequential)
    with _output(out, force, model) as output, writing(scratch), _claimed(scratch, identity):
        for number, group in enumerate(groups):
            place = scratch / f"{number}-{'-'.join(group)}"
            final = place / "final"
            spoken, heard = ([u for u in side if u.language in group] for side in (corpus, held_out))
            target = output.path if group is groups[-1] else final
            shown = progress and first_process()
            runs = scratch.with_name(f"{out.name}.runs") / place.name
            job = Job(
                start, place, target, spoken, heard, chosen, training, features, left_out, shown, runs, name_of(data)
            )
            records.append(_once(job, final / "record.json"))
            start = str(final)
        result = _summary(out, wanted, chosen, records, left_out)
        if isinstance(output, OutputDirectory):
            record = {**asdict(result), "path": out.name, "model": public(str(model)), "training": asdict(training)}
            (output.path / "training.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
            output.commit()
            shutil.rmtree(scratch, ignore_errors=True)
    return result


@dataclass(frozen=True, slots=True)
class _Nowhere:
    """What the other processes of a distributed run have instead of the output: only the first one writes."""

    path: Path


def first_process() -> bool:
    """True in the process that writes and prints: every one but the others that accelerate or torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def _output(out: Path, force: bool, model: str | Path) -> Iterator[OutputDirectory | _Nowhere]:
    if not first_process():
        yield _Nowhere(out)
        return
    with OutputDirectory(out, force=force, inputs=[Path(model)] if Path(model).exists() else []) as output:
        yield output


def _identity(
    model: str | Path,
    corpus: Corpus,
    dev: Corpus,
    languages: tuple[str, ...],
    tasks: tuple[str, ...],
    training: Training,
    sequential: bool,
) -> dict[str, Any]:
    """What checkpoints depend on."""
    weights = sorted(local_model(model).glob("*.safetensors"))
    spoken = "".join(f"{u.id}\t{u.text}\t{u.translation}\t{u.language}\n" for u in (*corpus, *dev))
    return {
        "model": public(str(model)),
        "weights": [sha256_file(path) for path in weights],
        "languages": list(languages),
        "tasks": list(tasks),
        "sequential": sequential,
        "data": hashlib.sha256(spoken.encode()).hexdigest(),
        **training.identity(),
    }


@contextmanager
def _claimed(scratch: Path, identity: dict[str, Any]) -> Iterator[None]:
    """As `_claim`. What the block refuses before its first checkpoint leaves no directory behind that was not there."""
    new = not scratch.exists()
    _claim(scratch, identity)
    try:
        yield
    except LorsError:
        if new and first_process() and not _has_checkpoints(scratch):
            shutil.rmtree(scratch, ignore_errors=True)
        raise


def _has_checkpoints(scratch: Path) -> bool:
    return any(scratch.glob("*/checkpoint-*")) or any(scratch.glob("*/final"))


def _claim(scratch: Path, identity: dict[str, Any]) -> None:
    """LorsError when `scratch` holds checkpoints of another run; else the checkpoints to come are this one's."""
    if not first_process():
        return
    if scratch.is_dir() and (odd := foreign(scratch, CHECKPOINTS)):
        raise LorsError(f"{scratch}: expected a new directory, or checkpoints of `lors finetune`, it has {odd!r}")
    record = scratch / "run.json"
    require_file(record, RUN, force=True)
    found = json.loads(record.read_text("utf-8")) if record.exists() else {}
    if _has_checkpoints(scratch):
        for name, value in identity.items():
            if found.get(name) != value:
                raise LorsError(
                    f"{scratch}: expected checkpoints of this run, got another one's: {name} was "
                    f"{found.get(name)!r} there and is {value!r} here; remove the directory to start anew"
                )
    scratch.mkdir(parents=True, exist_ok=True)
    write_json(record, identity)


def _once(job: Job, done: Path) -> Record:
    """Runs the job, unless `done` holds its record; a job that writes elsewhere, the last one, leaves none."""
    from .trainer import Record

    if done.exists():
        return Record(**json.loads(done.read_text("utf-8")))
    record = job.run()
    if done.parent == job.target and first_process():
        write_json(done, asdict(record))
    return record


def _summary(
    out: Path, languages: tuple[str, ...], tasks: tuple[str, ...], records: list[Record], left_out: LeftOut
) -> Trained:
    return Trained(
        path=out,
        languages=languages,
        tasks=tasks,
        items=sum(r.items for r in records),
        skipped=sum(r.skipped for r in records),
        steps=sum(r.steps for r in records),
        resumed_from=records[-1].resumed_from,
        train_loss=records[-1].loss,
        dev_wer=records[-1].dev_wer,
        longer=left_out.longer,
        unusable=tuple(left_out.unusable),
        seconds=sum(r.seconds for r in records),
    )
