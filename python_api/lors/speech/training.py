"""Fine-tuning Whisper with transformers' Seq2SeqTrainer: experts, the multi-task model, sequential training.

The trainer brings several devices and machines (``accelerate launch``), bf16, gradient checkpointing and checkpoints;
this module brings the data, the choice of trained weights, dev WER measured as `evaluate` measures it, and a run that
continues by itself after a kill.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..digest import sha256_file
from ..errors import LorsError
from ..layers import decomposed
from ..messages import nearest
from ..output import OutputDirectory
from .corpus import Corpus, by_task, load_corpus
from .features import features, log_mel
from .languages import parse_languages
from .scoring import score
from .tokens import labels
from .whisper import load_model, load_processor, quiet, require_languages, resolve_model, torch_device

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["TRAIN", "Trained", "Training", "finetune", "first_process"]

TRAIN = ("all", "matrices", "lora")
SCHEDULERS = (  # those that need no further settings
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)
_LORA_TARGETS = r".*\.(self_attn|encoder_attn)\.(q|k|v|out)_proj|.*\.fc[12]"
_LOG_STEPS = 50


@dataclass(frozen=True, slots=True)
class Training:
    """How to train; names and defaults are those of transformers' TrainingArguments where it has them.

    `train`: every weight, only the matrices that a decomposing merge works on, or LoRA adapters on these (the result is
    then the merged model, with the adapter beside it in ``adapter/``).
    """

    train: str = "all"
    max_steps: int = 1000
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    lr_scheduler_type: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    save_steps: int = 500
    eval_steps: int | None = None  # dev WER every so many steps; None: never
    early_stopping_patience: int | None = None  # evaluations without a better dev WER; the best weights are kept
    gradient_checkpointing: bool = False
    bf16: bool = False
    lora_rank: int = 8
    lora_alpha: int = 16
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.train not in TRAIN:
            raise LorsError(f"train: expected {', '.join(TRAIN)}, got {self.train!r}{nearest(self.train, TRAIN)}")
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise LorsError("early stopping: expected eval_steps, got none")
        if self.max_steps < 1:
            raise LorsError(f"max_steps: expected at least 1, got {self.max_steps}")
        if not 0 < self.learning_rate < math.inf:
            raise LorsError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if self.lr_scheduler_type not in SCHEDULERS:
            known = nearest(self.lr_scheduler_type, SCHEDULERS)
            raise LorsError(f"lr_scheduler_type: no {self.lr_scheduler_type!r}{known}")


@dataclass(frozen=True, slots=True)
class Trained:
    """What a fine-tuning run did."""

    path: Path
    languages: tuple[str, ...]
    tasks: tuple[str, ...]
    items: int  # utterances times tasks
    skipped: int  # references longer than the decoder
    steps: int
    resumed_from: int  # step of the checkpoint it continued from, 0 for none
    train_loss: float
    dev_wer: float | None
    seconds: float


def finetune(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path | Corpus,
    languages: str | Iterable[str],
    tasks: Sequence[str] = ("transcribe",),
    training: Training | None = None,
    dev: str | Path | Corpus | None = None,
    limit: int | None = None,
    max_seconds: float | None = None,
    sequential: bool = False,
    cache: Path | None = None,
    force: bool = False,
    progress: bool = False,
) -> Trained:
    """Trains on the utterances of all `languages` and `tasks` mixed (one language: an expert; more: multi-task).

    `sequential` trains one language after another, `training.max_steps` each, from the weights the one before left.
    Checkpoints stand in ``OUT.checkpoints`` until the end; the same call continues from the last complete one. `dev`
    defaults to the split "dev" of `data`. LorsError for bad input of any kind.
    """
    quiet()
    training = training or Training()
    wanted = parse_languages(languages)
    corpus = _corpus(data, wanted, "train", limit, max_seconds)
    held_out: Corpus = []
    if training.eval_steps is not None:
        held_out = _corpus(data if dev is None else dev, wanted, "dev", None, max_seconds)
    torch_device(training.device)
    out = Path(out)
    scratch = out.with_name(f"{out.name}.checkpoints")
    groups = [(language,) for language in wanted] if sequential else [wanted]
    stages, source = [], str(model)
    with _output(out, force, model) as output:
        _claim(scratch, _identity(str(model), corpus, held_out, wanted, tuple(tasks), training, sequential))
        for number, group in enumerate(groups):
            place = scratch / f"{number}-{'-'.join(group)}"
            target = output.path if number == len(groups) - 1 else place / "final"
            if not (place / "final" / "training.json").exists():
                part = [[u for u in side if u.language in group] for side in (corpus, held_out)]
                job = _Job(source, place, target, part[0], part[1], tuple(tasks), training, cache, progress)
                stages.append(job.run())
            source = str(place / "final")
        result = _summary(out, wanted, tuple(tasks), stages)
        if isinstance(output, OutputDirectory):
            record = {**asdict(result), "path": out.name, "model": str(model), "training": asdict(training)}
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
    model: str,
    corpus: Corpus,
    dev: Corpus,
    languages: tuple[str, ...],
    tasks: tuple[str, ...],
    training: Training,
    sequential: bool,
) -> dict[str, Any]:
    """What checkpoints depend on. The device is left out: a run may continue on another."""
    weights = sorted(Path(resolve_model(model)).glob("*.safetensors"))
    spoken = "".join(f"{u.id}\t{u.text}\t{u.translation}\t{u.language}\n" for u in (*corpus, *dev))
    settings = {name: value for name, value in asdict(training).items() if name != "device"}
    return {
        "model": model,
        "weights": [sha256_file(path) for path in weights],
        "languages": list(languages),
        "tasks": list(tasks),
        "sequential": sequential,
        "data": hashlib.sha256(spoken.encode()).hexdigest(),
        **settings,
    }


def _claim(scratch: Path, identity: dict[str, Any]) -> None:
    """LorsError when `scratch` holds checkpoints of another run; else the checkpoints to come are this one's."""
    if not first_process():
        return
    record = scratch / "run.json"
    found = json.loads(record.read_text("utf-8")) if record.exists() else {}
    if any(scratch.glob("*/checkpoint-*")) or any(scratch.glob("*/final")):
        for name, value in identity.items():
            if found.get(name) != value:
                raise LorsError(
                    f"{scratch}: expected checkpoints of this run, got another one's: {name} was "
                    f"{found.get(name)!r} there and is {value!r} here; remove the directory to start anew"
                )
    scratch.mkdir(parents=True, exist_ok=True)
    temporary = record.with_suffix(".tmp")
    temporary.write_text(json.dumps(identity, indent=1) + "\n", "utf-8")
    temporary.replace(record)


def _corpus(
    data: str | Path | Corpus, languages: tuple[str, ...], split: str, limit: int | None, max_seconds: float | None
) -> Corpus:
    if isinstance(data, list):
        return [u for u in data if u.language in languages and u.split in (None, split)]
    return load_corpus(data, languages=languages, split=split, limit=limit, max_seconds=max_seconds)


def _summary(out: Path, languages: tuple[str, ...], tasks: tuple[str, ...], stages: list[_Stage]) -> Trained:
    return Trained(
        path=out,
        languages=languages,
        tasks=tasks,
        items=sum(s.items for s in stages),
        skipped=sum(s.skipped for s in stages),
        steps=sum(s.steps for s in stages),
        resumed_from=stages[-1].resumed_from,
        train_loss=stages[-1].loss,
        dev_wer=stages[-1].dev_wer,
        seconds=sum(s.seconds for s in stages),
    )


# -------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True, slots=True)
class _Stage:
    items: int
    skipped: int
    steps: int
    resumed_from: int
    loss: float
    dev_wer: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class _Job:
    source: str
    scratch: Path
    target: Path
    corpus: Corpus
    dev: Corpus
    tasks: tuple[str, ...]
    training: Training
    cache: Path | None
    progress: bool

    def run(self) -> _Stage:
        from transformers import set_seed

        began = time.monotonic()
        set_seed(self.training.seed)
        processor, model = load_processor(self.source), load_model(self.source)
        require_languages(model, {u.language for u in self.corpus}, self.source)
        data = _Dataset.build(self.corpus, self.tasks, processor, model.config.max_target_positions, self.cache)
        model = _trainable(model, self.training)
        trainer = self._trainer(model, processor, data)
        checkpoint = _last_checkpoint(self.scratch)
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        wer = trainer.evaluate()["eval_wer"] if self.dev else None
        self._save(trainer, processor)
        trainer.accelerator.wait_for_everyone()
        return _Stage(
            items=len(data),
            skipped=data.skipped,
            steps=int(trainer.state.global_step),
            resumed_from=int(checkpoint.name.split("-")[1]) if checkpoint else 0,
            loss=float(output.training_loss),
            dev_wer=wer,
            seconds=time.monotonic() - began,
        )

    def _save(self, trainer: Any, processor: Any) -> None:
        if not trainer.is_world_process_zero():
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self.training.train == "lora":
            model.save_pretrained(self.target / "adapter")
            model = model.merge_and_unload()
        model.config.use_cache = True
        model.save_pretrained(self.target)
        processor.tokenizer.set_prefix_tokens(language="english", task="transcribe", predict_timestamps=False)
        processor.save_pretrained(self.target)
        if self.target.name == "final":  # a stage of sequential training: this file says it is complete
            (self.target / "training.json").write_text("{}\n", "utf-8")

    def _trainer(self, model: Any, processor: Any, data: _Dataset) -> Any:
        import torch
        from transformers import EarlyStoppingCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments

        t, dev = self.training, _DevSet(self.dev, self.tasks, processor, self.cache)

        class Trainer(Seq2SeqTrainer):
            """Measures dev WER the way `evaluate` does instead of looping over a data loader."""

            def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
                unwrapped = self.accelerator.unwrap_model(self.model).eval()
                metrics = {"eval_wer": dev.wer(unwrapped)}
                self.log(metrics)
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
                return metrics

        evaluating = t.eval_steps is not None
        # transformers 5 renames it in the middle of its life, and warns of the old name even when it is off.
        known = Seq2SeqTrainingArguments.__dataclass_fields__
        checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
        optional: dict[str, Any] = {checkpointing: True} if t.gradient_checkpointing else {}
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(self.scratch),
            max_steps=t.max_steps,
            per_device_train_batch_size=t.per_device_train_batch_size,
            gradient_accumulation_steps=t.gradient_accumulation_steps,
            learning_rate=t.learning_rate,
            warmup_steps=t.warmup_steps,
            lr_scheduler_type=t.lr_scheduler_type,
            weight_decay=t.weight_decay,
            max_grad_norm=t.max_grad_norm,
            optim="adamw_torch_fused",
            save_strategy="steps",
            save_steps=t.eval_steps or t.save_steps,
            save_total_limit=2,
            eval_strategy="steps" if evaluating else "no",
            eval_steps=t.eval_steps,
            load_best_model_at_end=evaluating,
            metric_for_best_model="wer",
            greater_is_better=False,
            bf16=t.bf16,
            seed=t.seed,
            data_seed=t.seed,
            use_cpu=t.device == "cpu",
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",
            logging_steps=_LOG_STEPS,
            disable_tqdm=not self.progress,
            dataloader_pin_memory=torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
            **optional,
        )
        callbacks: list[Any] = []
        # A dataset is anything with __len__ and __getitem__; the annotation of Trainer knows torch's class only.
        dataset: Any = data
        if t.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(t.early_stopping_patience))
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=dataset if evaluating else None,  # only looked at to see that there is one
            data_collator=_collate,
            callbacks=callbacks,
        )
        if not self.progress:
            from transformers.trainer_callback import PrinterCallback

            trainer.remove_callback(PrinterCallback)
        return trainer


def _last_checkpoint(scratch: Path) -> Path | None:
    """The newest checkpoint that is complete: the trainer writes ``trainer_state.json`` last."""
    found = sorted(scratch.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text("utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def _trainable(model: Any, training: Training) -> Any:
    """Freezes what is not trained; with LoRA the model is wrapped."""
    # The encoder's positions are a fixed sinusoid; from_pretrained of transformers 5 forgets that it is not trained.
    model.model.encoder.embed_positions.requires_grad_(False)
    if training.train == "matrices":
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        chosen = decomposed(shapes, config=model.config.to_dict())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
    if training.gradient_checkpointing:
        model.config.use_cache = False
        model.enable_input_require_grads()
    if training.train == "lora":
        from .audio import require

        peft = require("peft")
        config = peft.LoraConfig(r=training.lora_rank, lora_alpha=training.lora_alpha, target_modules=_LORA_TARGETS)
        model = peft.get_peft_model(model, config)
    return model


class _DevSet:
    """Dev utterances and their features, computed when first needed and kept for the next measurement."""

    def __init__(self, corpus: Corpus, tasks: Sequence[str], processor: Any, cache: Path | None) -> None:
        self._parts = [
            (task, language, by_task((u for u in corpus if u.language == language), task))
            for task in tasks
            for language in dict.fromkeys(u.language for u in corpus)
        ]
        self._processor, self._cache = processor, cache
        self._features: dict[tuple[str, str], NDArray[np.float16]] = {}

    def wer(self, model: Any) -> float:
        """Mean of WER over languages and tasks."""
        from .evaluation import transcribe

        scores = []
        for task, language, part in self._parts:
            if (task, language) not in self._features:
                self._features[task, language] = features(part, self._processor.feature_extractor, self._cache)
            said = transcribe(model, self._processor, self._features[task, language], language, task)
            references = [u.reference(task) or "" for u in part]
            target = language if task == "transcribe" else "en"
            scores.append(score(references, said, language=target, task=task)[0].wer)
        return sum(scores) / len(scores)


# ----------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True)
class _Dataset:
    """Items (row, labels); features from the cache, or computed from the audio when an item is asked for."""

    corpus: Corpus
    rows: list[tuple[int, list[int]]]
    mel: NDArray[np.float16] | None
    extractor: Any
    skipped: int

    @classmethod
    def build(cls, corpus: Corpus, tasks: Sequence[str], processor: Any, longest: int, cache: Path | None) -> _Dataset:
        rows: list[tuple[int, list[int]]] = []
        skipped = 0
        for task in tasks:
            by_task([], task)  # an unknown task is an error before any work
            for row, utterance in enumerate(corpus):
                if not utterance.reference(task):
                    continue
                ids = labels(processor.tokenizer, utterance, task)
                if len(ids) > longest:
                    skipped += 1
                else:
                    rows.append((row, ids))
        if not rows:
            raise LorsError(f"finetune: expected utterances with a reference for {', '.join(tasks)}, got none")
        mel = features(corpus, processor.feature_extractor, cache) if cache is not None else None
        return cls(corpus, rows, mel, processor.feature_extractor, skipped)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, ids = self.rows[index]
        mel = self.mel[row] if self.mel is not None else log_mel([self.corpus[row]], self.extractor)[0]
        return {"input_features": mel, "labels": ids}


def _collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    import numpy as np
    import torch

    longest = max(len(item["labels"]) for item in items)
    padded = [item["labels"] + [-100] * (longest - len(item["labels"])) for item in items]
    mel = torch.from_numpy(np.stack([item["input_features"] for item in items])).float()
    return {"input_features": mel, "labels": torch.tensor(padded)}
