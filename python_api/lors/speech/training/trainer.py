"""One training run with transformers' Seq2SeqTrainer: from a model to a directory, over checkpoints of its own.

The trainer brings several devices and machines (``accelerate launch``), bf16, gradient checkpointing and checkpoints;
here are the choice of trained weights, the data, dev WER measured as `evaluate` measures it, and the way on after a
kill, to the weights of a run that was not killed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import EarlyStoppingCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.models.whisper.modeling_whisper import shift_tokens_right
from transformers.trainer_callback import PrinterCallback

from ...checkpoints.layers import decomposed
from ...errors import LorsError, printable
from ...progress import bar
from ..data.audio import require
from ..data.features import Features, require_window
from ..data.left_out import LeftOut
from ..data.loading import workers_for
from ..data.utterance import Corpus, by_task
from ..model.tokens import labels
from ..model.whisper import load_model, load_processor
from ..scoring.evaluation import Decoder
from ..scoring.loss import summed_loss
from ..scoring.metrics import score
from .settings import Training, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Job", "Record"]

_LORA_TARGETS = r".*\.(self_attn|encoder_attn)\.(q|k|v|out)_proj|.*\.fc[12]"
_LOG_STEPS = 50
_FULL_DISK = 1 << 16  # bytes free: less than any file written here needs


@dataclass(frozen=True, slots=True)
class Record:
    """What a run did."""

    items: int
    skipped: int
    steps: int
    resumed_from: int
    loss: float | None  # None when the checkpoint was the last one already
    dev_wer: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Job:
    """Trains the model `source` on `corpus` and saves it in `target`; checkpoints stand in `scratch`."""

    source: str
    scratch: Path
    target: Path
    corpus: Corpus
    dev: Corpus
    tasks: tuple[str, ...]
    training: Training
    features: Path
    left_out: LeftOut
    progress: bool
    runs: Path  # of TensorBoard
    name: str  # of the corpus, in messages

    def run(self) -> Record:
        """Trains, from the last complete checkpoint where there is one."""
        began = time.monotonic()
        set_seed(self.training.seed)
        processor, model = load_processor(self.source), load_model(self.source)
        augment = model.config.apply_spec_augment  # as the model came; what is trained with is a setting
        features, longest = Features(processor.feature_extractor, self.features), model.config.max_target_positions
        data = _Dataset.build(self.corpus, self.tasks, processor.tokenizer, longest, features, self.left_out, self.name)
        checkpoint = _last_checkpoint(self.scratch, self.training.max_steps)
        arguments = _arguments(self.training, self.scratch)
        dev = _DevSet.of(
            self.dev, self.tasks, processor, self.features, arguments.dataloader_num_workers, self.left_out,
            self.training.generation_num_beams,
            self.training.metric_for_best_model == "loss",
        )  # fmt: skip
        trainer = _trainer(_trainable(model, self.training), arguments, self.training, data, dev)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(self.runs)  # not among the checkpoints, which go
        if checkpoint is not None and checkpoint.finished:
            trainer._load_from_checkpoint(str(checkpoint.best))  # train() would take one step more
            steps, loss = checkpoint.step, None
        else:
            steps, loss = self._train(trainer, checkpoint)
        record = Record(
            items=len(data),
            skipped=data.skipped,
            steps=steps,
            resumed_from=checkpoint.step if checkpoint else 0,
            loss=loss,
            dev_wer=trainer.evaluate()["eval_wer"] if self.dev else None,
            seconds=time.monotonic() - began,
        )
        if trainer.is_world_process_zero():
            with _full_disk(self.target):
                self._save(trainer.accelerator.unwrap_model(trainer.model), processor, augment)
        self.left_out.note(gather_object(self.left_out.unusable))
        trainer.accelerator.wait_for_everyone()
        return record

    def _train(self, trainer: _Trainer, checkpoint: _Checkpoint | None) -> tuple[int, float]:
        """(steps, mean loss since the checkpoint)."""
        language = ",".join(dict.fromkeys(u.language for u in self.corpus))
        with bar(language, self.training.max_steps, quiet=not self.progress) as advance:
            if self.progress:
                trainer.add_callback(_Progress(language, advance))
            with _full_disk(self.scratch):
                trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        return int(trainer.state.global_step), trainer.mean_loss()

    def _save(self, model: Any, processor: Any, augment: bool) -> None:
        if self.training.train == "lora":
            model.save_pretrained(self.target / "adapter")
            model = model.merge_and_unload()
        model.config.use_cache, model.config.apply_spec_augment = True, augment
        model.save_pretrained(self.target)
        processor.tokenizer.set_prefix_tokens(language="english", task="transcribe", predict_timestamps=False)
        processor.save_pretrained(self.target)


@contextmanager
def _full_disk(path: Path) -> Iterator[None]:
    """torch and safetensors have errors of their own for a disk that is full; here it is an OSError."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if "No space left" not in str(error) and shutil.disk_usage(path).free > _FULL_DISK:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


# --------------------------------------------------------------------------------------------------- the trainer


class _Trainer(Seq2SeqTrainer):
    """The loss of a step as one batch would have it, and dev WER the way `evaluate` measures it."""

    dev: _DevSet
    smoothing: float
    seen: Tensor  # [2]: sum of the cross-entropies, and of how many tokens, in this process

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy summed over the tokens that count, divided by their number in the whole step: all batches that
        accumulate, in all processes.

        Whisper's own loss is the mean over its batch alone. The trainer adds up what accumulates, and takes what it is
        given to be divided by `num_items_in_batch`: with N batches to a step the gradient would be N times too large.
        """
        self.dev.left_out.note(inputs["unusable"])
        self.dev.left_out.require_few(self.train_dataset.name, len(self.train_dataset))
        labels, config = inputs["labels"], self.accelerator.unwrap_model(model).config
        spoken = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
        outputs = model(input_features=inputs["input_features"], decoder_input_ids=spoken)
        mean, count = (
            cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), label_smoothing=self.smoothing),
            labels.ne(-100).sum(),
        )
        self.seen += torch.stack([mean.detach() * count, count]).double()
        loss = mean * (count / num_items_in_batch) * self.accelerator.num_processes  # whose gradients are averaged
        return (loss, outputs) if return_outputs else loss

    def mean_loss(self) -> float:
        """Over every token that was trained on since the start of this run, in all processes."""
        total, count = self.accelerator.reduce(self.seen, reduction="sum").tolist()
        return float(total / count)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        scores = self.dev.scores(self.accelerator.unwrap_model(self.model).eval(), self.accelerator)
        metrics = {f"eval_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics


def _trainer(
    model: Any, arguments: Seq2SeqTrainingArguments, training: Training, data: _Dataset, dev: _DevSet
) -> _Trainer:
    # A dataset is anything with __len__ and __getitem__; the annotation of Trainer knows torch's class only.
    dataset: Any = data
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=dataset if training.eval_steps else None,  # only looked at to see that there is one
        data_collator=_collate,
    )
    trainer.model_accepts_loss_kwargs = True  # `num_items_in_batch` is counted, and the loss taken to be divided by it
    trainer.smoothing = training.label_smoothing_factor
    trainer.dev, trainer.seen = dev, torch.zeros(2, dtype=torch.float64, device=trainer.args.device)
    if training.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(training.early_stopping_patience))
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(t: Training, scratch: Path) -> Seq2SeqTrainingArguments:
    evaluating = t.eval_steps is not None
    # transformers 5 renames it in the middle of its life, and warns of the old name even when it is off.
    known = Seq2SeqTrainingArguments.__dataclass_fields__
    checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
    optional: dict[str, Any] = {checkpointing: True} if t.gradient_checkpointing else {}
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(scratch),
        max_steps=t.max_steps,
        per_device_train_batch_size=t.per_device_train_batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        learning_rate=t.learning_rate,
        warmup_steps=t.warmup_steps,
        lr_scheduler_type=t.lr_scheduler_type,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        optim=t.optim,
        save_strategy="steps",
        save_steps=t.eval_steps or t.save_steps,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,  # early stopping goes on counting
        eval_strategy="steps" if evaluating else "no",
        eval_steps=t.eval_steps,
        load_best_model_at_end=evaluating,
        metric_for_best_model=t.metric_for_best_model,
        greater_is_better=t.metric_for_best_model == "bleu",
        bf16=t.bf16,
        fp16=t.fp16,
        seed=t.seed,
        data_seed=t.seed,
        use_cpu=t.device == "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=t.report_to,
        log_level_replica="error",  # of other processes: what the first one says is enough
        logging_steps=_LOG_STEPS,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=workers_for(t.device) if t.dataloader_num_workers is None else t.dataloader_num_workers,
        ddp_find_unused_parameters=False,
        **optional,
    )
    if arguments.n_gpu > 1:  # without a launcher the trainer would spread each batch over all GPUs that it sees
        arguments._n_gpu = 1
    return arguments


class _Progress(TrainerCallback):
    """A line each time the trainer logs, also for the log of a cluster; on a terminal a bar below."""

    def __init__(self, label: str, advance: Callable[[int, int], None] | None) -> None:
        self._label, self._advance = label, advance

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._advance is not None:
            self._advance(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        told = [f"loss {logs['loss']:.3f}"] if "loss" in logs else []
        told += [f"dev WER {logs['eval_wer']:.2f} %"] if "eval_wer" in logs else []
        told += [f"dev loss {logs['eval_loss']:.3f}"] if "eval_loss" in logs else []
        if told:
            line = f"{self._label}: step {state.global_step} of {state.max_steps}: {', '.join(told)}"
            print(printable(line), file=sys.stderr)


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    path: Path
    step: int
    best: Path  # the checkpoint of the lowest dev WER; where none is measured, this one
    finished: bool  # all steps are done, or training stopped early here


def _last_checkpoint(scratch: Path, max_steps: int) -> _Checkpoint | None:
    """The newest checkpoint that is complete: the trainer writes ``trainer_state.json`` last."""
    found = sorted(scratch.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in found:
        file = path / "trainer_state.json"
        try:
            state = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError):
            continue
        best = scratch / Path(state["best_model_checkpoint"] or path).name
        if state["best_model_checkpoint"] not in (None, str(best)):
            # In a directory that was moved the trainer would give up the best weights without a word.
            write_json(file, {**state, "best_model_checkpoint": str(best)})
        stopped = state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
        return _Checkpoint(path, state["global_step"], best, stopped or state["global_step"] >= max_steps)
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
    if training.freeze_encoder:
        model.freeze_encoder()
    # Of the modules, not of the configuration, which is saved with the model.
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = training.dropout
    model.config.apply_spec_augment = training.apply_spec_augment
    if training.gradient_checkpointing:
        model.config.use_cache = False
        model.enable_input_require_grads()
    if training.train == "lora":
        peft = require("peft")
        config = peft.LoraConfig(r=training.lora_rank, lora_alpha=training.lora_alpha, target_modules=_LORA_TARGETS)
        model = peft.get_peft_model(model, config)
    return model


# ----------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True)
class _Dataset:
    """Items (features, labels), or (error, labels) for a recording that cannot be read."""

    corpus: Corpus
    rows: list[tuple[int, list[int]]]
    features: Features
    skipped: int
    name: str

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        tasks: Sequence[str],
        tokenizer: Any,
        longest: int,
        features: Features,
        left_out: LeftOut,
        name: str,
    ) -> _Dataset:
        readable = []
        for utterance in corpus:  # now, and not after hours when the turn of a recording comes
            with left_out.unless_unusable():
                require_window(utterance.audio, features.extractor)
                readable.append(utterance)
        left_out.require_few(name, len(corpus))
        rows: list[tuple[int, list[int]]] = []
        skipped = 0
        for task in tasks:
            for row, utterance in enumerate(readable):
                if not utterance.reference(task):
                    continue
                ids = labels(tokenizer, utterance, task)
                if len(ids) > longest:
                    skipped += 1
                else:
                    rows.append((row, ids))
        if not rows:
            raise LorsError(f"{name}: expected utterances with a reference for {', '.join(tasks)}, got none")
        return cls(readable, rows, features, skipped, name)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[NDArray[np.float16] | str, list[int]]:
        row, ids = self.rows[index]
        try:
            return self.features.of(self.corpus[row].audio), ids
        except LorsError as error:
            return str(error), ids


def _collate(items: Sequence[tuple[NDArray[np.float16] | str, list[int]]]) -> dict[str, Any]:
    read = [(mel, ids) for mel, ids in items if not isinstance(mel, str)]
    unusable = [said for said, _ in items if isinstance(said, str)]
    if not read:
        raise LorsError(f"corpus: expected a recording that can be read in every batch, got none; {unusable[0]}")
    longest = max(len(ids) for _, ids in read)
    padded = [ids + [-100] * (longest - len(ids)) for _, ids in read]
    mel = torch.from_numpy(np.stack([mel for mel, _ in read])).float()
    return {"input_features": mel, "labels": torch.tensor(padded), "unusable": unusable}


@dataclass(frozen=True, slots=True)
class _DevSet:
    """Dev utterances by task and language; the processes of a run share them."""

    parts: list[tuple[str, str, Corpus]]
    processor: Any
    home: Path
    workers: int
    left_out: LeftOut
    beams: int
    with_loss: bool

    @classmethod
    def of(cls, corpus: Corpus, tasks: Sequence[str], *rest: Any) -> _DevSet:
        languages = dict.fromkeys(u.language for u in corpus)
        parts = [
            (task, language, by_task((u for u in corpus if u.language == language), task))
            for task in tasks
            for language in languages
        ]
        return cls(parts, *rest)

    def scores(self, model: Any, accelerator: Any) -> dict[str, float]:
        """`wer`, mean over languages and tasks; `bleu`, mean over the languages that are translated, if any; `loss` where it
        is asked for, mean over languages and tasks."""
        decoder = Decoder.of(
            model, self.processor, self.home, beams=self.beams, workers=self.workers, left_out=self.left_out
        )
        found, losses = [], []
        for task, language, part in self.parts:
            mine = range(accelerator.process_index, len(part), accelerator.num_processes)
            texts = decoder.transcribe([part[i] for i in mine], [task])[task].texts if mine else []
            said = dict(gather_object(list(zip(mine, texts, strict=True))))
            answers = [(u.reference(task) or "", said[i]) for i, u in enumerate(part) if said[i] is not None]
            target = language if task == "transcribe" else "en"
            found.append(score(*map(list, zip(*answers, strict=True)), language=target, task=task)[0])
            if self.with_loss:
                sums = gather_object([summed_loss(decoder, [part[i] for i in mine], task)] if mine else [])
                losses.append(sum(total for total, _ in sums) / sum(count for _, count in sums))
        bleu = [one.bleu for one in found if one.bleu is not None]
        means = {"wer": sum(one.wer for one in found) / len(found)}
        if losses:
            means["loss"] = sum(losses) / len(losses)
        return means | ({"bleu": sum(bleu) / len(bleu)} if bleu else {})
