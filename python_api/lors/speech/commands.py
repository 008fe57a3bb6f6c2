"""The `lors` sub-commands on speech. Imported by the command line only when one of them is called.

Options of `finetune` carry the names of transformers' example script; ``--learning-rate`` and ``--learning_rate`` are
the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import LorsError, print_lines, printable
from .data.left_out import SHARE, LeftOut

if TYPE_CHECKING:
    from .scoring.evaluation import Evaluation

__all__ = ["COMMANDS", "evaluate", "experiment", "finetune", "require_extra", "synth"]


_DATA = "Manifest, covost2:DIR, common_voice:DIR, fleurs:[DIR] or datasets:NAME,KEY=VALUE (docs/speech.md)."

EXTRA = ("transformers", "accelerate", "jiwer", "sacrebleu", "soundfile", "soxr", "num2words", "babel")


def require_extra() -> None:
    """LorsError that names what is absent of the `speech` extra: before the work, not in the midst of it."""
    from importlib.util import find_spec

    absent = [module for module in EXTRA if find_spec(module) is None]
    if absent:
        raise LorsError(f"speech needs {', '.join(absent)}: pip install 'lors-merging[speech]'")


def synth(
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    languages: Annotated[str, typer.Option(help="Codes, separated by commas.")] = "ca,de,es,fr,it,id,nl,pt,ru,sv",
    train: Annotated[int, typer.Option(min=0, help="Utterances per language.")] = 1000,
    dev: Annotated[int, typer.Option(min=0, help="Utterances per language.")] = 100,
    test: Annotated[int, typer.Option(min=0, help="Utterances per language.")] = 200,
    condition: Annotated[str, typer.Option(help="clean or hard (other voices, faster, 0 to 10 dB SNR).")] = "clean",
    seed: Annotated[int, typer.Option(help="Of sentences and voices.")] = 0,
    audio_format: Annotated[str, typer.Option("--format", help="flac or wav.")] = "flac",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of espeak-ng at a time (default: cores).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a corpus in OUT.")] = False,
) -> None:
    """Make a speech corpus with translations by espeak-ng: audio files and manifest.tsv."""
    from .data.languages import parse_languages
    from .data.synth import synthesise

    require_extra()
    codes = parse_languages(languages)
    sizes = {split: size for split, size in (("train", train), ("dev", dev), ("test", test)) if size}
    manifest = synthesise(
        out, languages=codes, sizes=sizes, condition=condition, seed=seed, audio_format=audio_format, workers=workers,
        force=force, progress=True,
    )  # fmt: skip
    print_lines(f"{len(codes) * sum(sizes.values())} utterances -> {manifest}")


def _names(name: str) -> tuple[str, str]:
    return f"--{name}", f"--{name.replace('-', '_')}"


def finetune(
    model: Annotated[
        str, typer.Option("--model", "--model_name_or_path", help="Directory, hub id, tiny or tiny-early.")
    ],
    data: Annotated[str, typer.Option(help=_DATA)],
    language: Annotated[str, typer.Option(help="One code: an expert; several with commas: multi-task.")],
    out: Annotated[Path, typer.Option("-o", "--out", "--output_dir", help="Directory to write.")],
    task: Annotated[str, typer.Option(help="transcribe, translate or both.")] = "transcribe",
    train: Annotated[str, typer.Option(help="Weights trained: all, matrices or lora.")] = "all",
    sequential: Annotated[
        bool, typer.Option("--sequential", help="One language after another instead of mixed.")
    ] = False,
    max_steps: Annotated[int, typer.Option(*_names("max-steps"), min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(*_names("per-device-train-batch-size"), min=1)] = 16,
    accumulation: Annotated[int, typer.Option(*_names("gradient-accumulation-steps"), min=1)] = 1,
    learning_rate: Annotated[float, typer.Option(*_names("learning-rate"), min=0)] = 1e-5,
    warmup_steps: Annotated[int, typer.Option(*_names("warmup-steps"), min=0)] = 0,
    scheduler: Annotated[
        str, typer.Option(*_names("lr-scheduler-type"), help="linear, cosine, constant ...")
    ] = "linear",
    weight_decay: Annotated[float, typer.Option(*_names("weight-decay"), min=0)] = 0.0,
    save_steps: Annotated[int, typer.Option(*_names("save-steps"), min=1)] = 500,
    eval_steps: Annotated[
        int | None, typer.Option(*_names("eval-steps"), min=1, help="Measure dev WER this often; keep the best.")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            "--patience",
            *_names("early-stopping-patience"),
            min=1,
            help="Stop after so many measurements without a better one.",
        ),
    ] = None,
    dev: Annotated[str | None, typer.Option(help="Corpus whose split dev is used (default: --data).")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", *_names("max-train-samples"), min=1, help="Utterances per language.")
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option("--max-seconds", *_names("max-duration-in-seconds"), min=0, help="Leave out longer recordings."),
    ] = None,
    lora_rank: Annotated[int, typer.Option(*_names("lora-rank"), min=1)] = 8,
    lora_alpha: Annotated[int, typer.Option(*_names("lora-alpha"), min=1)] = 16,
    gradient_checkpointing: Annotated[
        bool, typer.Option(*_names("gradient-checkpointing"), help="Less memory, more time.")
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Mixed precision, on GPUs without bfloat16.")] = False,
    optim: Annotated[str, typer.Option(help="adamw_torch_fused, adafactor, or adamw_8bit.")] = "adamw_torch_fused",
    report_to: Annotated[str, typer.Option(*_names("report-to"), help="none, tensorboard or wandb.")] = "none",
    best: Annotated[str, typer.Option(*_names("metric-for-best-model"), help="On dev: wer, bleu or loss.")] = "wer",
    beams: Annotated[
        int, typer.Option("--beams", *_names("generation-num-beams"), min=1, help="Of decoding dev; 1: greedy.")
    ] = 1,
    smoothing: Annotated[float, typer.Option(*_names("label-smoothing-factor"), min=0)] = 0.0,
    dropout: Annotated[float, typer.Option(min=0, help="While training.")] = 0.0,
    augment: Annotated[
        bool, typer.Option(*_names("apply-spec-augment"), help="Hide parts of the features while training.")
    ] = False,
    freeze_encoder: Annotated[bool, typer.Option(*_names("freeze-encoder"), help="Train the decoder only.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = None,
    seed: Annotated[int, typer.Option(help="Of order and initialisation.")] = 0,
    sample_seed: Annotated[int, typer.Option(*_names("sample-seed"), help="Which utterances --limit takes.")] = 0,
    unusable: Annotated[
        float, typer.Option(min=0, max=1, help="Share of rows and recordings that may be unreadable; 0: none.")
    ] = SHARE,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            *_names("dataloader-num-workers"),
            min=0,
            help="Processes that compute features (default: none on cpu, up to 8 for a GPU).",
        ),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep features in this directory.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fine-tune Whisper into an expert or a multi-task model; a killed run continues when started again.

    lors finetune --model openai/whisper-small --data covost2:/data/cv --language ca --task both -o ca
    """
    from .training.finetune import finetune as run
    from .training.finetune import first_process
    from .training.settings import Training

    require_extra()
    training = Training(
        train=train, max_steps=max_steps, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=learning_rate, warmup_steps=warmup_steps, lr_scheduler_type=scheduler, weight_decay=weight_decay,
        save_steps=save_steps, eval_steps=eval_steps, early_stopping_patience=patience, lora_rank=lora_rank,
        lora_alpha=lora_alpha, gradient_checkpointing=gradient_checkpointing, bf16=bf16, seed=seed,
        device=device_of(device), dataloader_num_workers=workers, generation_num_beams=beams, metric_for_best_model=best,
        label_smoothing_factor=smoothing, dropout=dropout, apply_spec_augment=augment, freeze_encoder=freeze_encoder,
        fp16=fp16, optim=optim, report_to=report_to,
    )  # fmt: skip
    result = run(
        model, out, data=data, languages=language, tasks=task, training=training, dev=dev, limit=limit,
        max_seconds=max_seconds, sample_seed=sample_seed, unusable=unusable, sequential=sequential, cache=cache,
        force=force, progress=True,
    )  # fmt: skip
    if not first_process():
        return
    if as_json:
        from dataclasses import asdict

        print(json.dumps({**asdict(result), "path": str(result.path)}))
        return
    loss = "" if result.train_loss is None else f", loss {result.train_loss:.3f}"
    wer = "" if result.dev_wer is None else f", dev WER {result.dev_wer:.2f} %"
    resumed = f" (continued from step {result.resumed_from})" if result.resumed_from else ""
    skipped = f", {result.skipped} skipped: longer than the decoder" if result.skipped else ""
    print_lines(f"{result.steps} steps{resumed} on {result.items} items{skipped}{loss}{wer}, "
          f"{result.seconds:.0f} s -> {result.path}")  # fmt: skip
    _tell(LeftOut(longer=result.longer, unusable=list(result.unusable)))


def _tell(left_out: LeftOut) -> None:
    if line := left_out.told():
        print_lines(line)


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Directories, hub ids, tiny or tiny-early.")],
    data: Annotated[str, typer.Option(help=_DATA)],
    languages: Annotated[str, typer.Option(help="Codes, separated by commas.")],
    tasks: Annotated[str, typer.Option(help="transcribe, translate or transcribe,translate.")] = "transcribe",
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Utterances per language.")] = None,
    max_seconds: Annotated[float | None, typer.Option(min=0, help="Leave out longer recordings.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Utterances decoded at a time.")] = 64,
    beams: Annotated[int, typer.Option(min=1, help="1: greedy.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    compare: Annotated[
        str | None, typer.Option(metavar="A,B", help="Paired bootstrap between two of the models.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write scores.json and every answer here.")] = None,
    sample_seed: Annotated[int, typer.Option(help="Which utterances --limit takes.")] = 0,
    unusable: Annotated[
        float, typer.Option(min=0, max=1, help="Share of rows and recordings that may be unreadable; 0: none.")
    ] = SHARE,
    normaliser: Annotated[
        str, typer.Option(help="whisper, or marks: the same, but combining marks stay (Tamil, Hindi, Thai ...).")
    ] = "whisper",
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that compute features (default: none on cpu, up to 8 for a GPU)."),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep features in this directory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score models on languages and tasks: WER, CER, BLEU, chrF++.

    lors evaluate base merged --data corpus/ --languages ca,de --compare base,merged
    """
    from .data.languages import parse_languages
    from .data.utterance import parse_tasks
    from .scoring.evaluation import evaluate as run
    from .scoring.evaluation import make_room, model_names

    require_extra()
    # All that can be wrong is looked at before hours of decoding.
    wanted, chosen = parse_languages(languages), parse_tasks(tasks)
    pair = None if compare is None else _pair(compare, model_names(models))
    if out is not None:
        make_room(out)
    evaluation = run(
        models, data=data, languages=wanted, tasks=chosen, split=split, limit=limit, max_seconds=max_seconds,
        batch_size=batch_size, beams=beams, device=device_of(device), dtype=dtype, cache=cache, workers=workers,
        sample_seed=sample_seed, unusable=unusable, normaliser=normaliser, progress=True,
    )  # fmt: skip
    if out is not None:
        evaluation.write(out)
    if as_json:
        print(json.dumps(evaluation.rows(), indent=1))
    else:
        show_evaluation(evaluation)
        _tell(evaluation.left_out)
    if pair is not None:
        _show_comparison(evaluation, *pair, chosen)


def _pair(text: str, known: Sequence[str]) -> tuple[str, str]:
    first, _, second = text.partition(",")
    for name in (first, second):
        if name not in known:
            raise LorsError(f"--compare: expected A,B of the models {', '.join(known)}, got {text!r}")
    return first, second


def _show_comparison(evaluation: Evaluation, first: str, second: str, tasks: tuple[str, ...]) -> None:
    from .scoring.evaluation import compare

    for task in tasks:
        metric = "wer" if task == "transcribe" else "bleu"
        interval = compare(evaluation, first, second, task=task, metric=metric)
        print_lines(f"{task}: {metric.upper()} of {first} minus {second}: {interval.difference:+.2f} "
              f"[{interval.low:+.2f}, {interval.high:+.2f}] (95 %, paired bootstrap)")  # fmt: skip


# task -> what the table shows: the score of each language, and means over the languages
_SHOWN = {
    "transcribe": ("WER %", {"wer": "mean", "wer_raw": "raw WER", "cer": "CER"}),
    "translate": ("BLEU", {"bleu": "mean", "chrf": "chrF++", "wer": "WER"}),
}


def show_evaluation(evaluation: Evaluation) -> None:
    """One table per task: models down; languages, and the means of all metrics over them, across."""
    from rich.table import Table

    from .experiment.report import wide_console

    console = wide_console()
    for task in dict.fromkeys(r.task for r in evaluation.results):
        rows = [r for r in evaluation.results if r.task == task]
        title, metrics = _SHOWN[task]
        main = next(iter(metrics))
        units = {
            r.language: f"{r.language} (CER)" if r.score.unit == "CER" and main == "wer" else r.language for r in rows
        }
        table = Table(f"{task}: {title}", *units.values(), *metrics.values(), box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for model in dict.fromkeys(r.model for r in rows):
            scores = [r.score for r in rows if r.model == model]
            means = [sum(getattr(s, name) for s in scores) / len(scores) for name in metrics]
            table.add_row(
                printable(model), *(f"{value:.2f}" for value in (*(getattr(s, main) for s in scores), *means))
            )
        console.print(table)
        dropped = sum(r.score.dropped for r in rows)
        speed = sum(r.decode_seconds for r in rows) / sum(r.audio_seconds for r in rows)
        signature = f"; {rows[0].score.bleu_signature}" if task == "translate" else ""
        print_lines(f"{sum(r.score.utterances for r in rows)} answers, {dropped} empty references dropped, "
              f"normaliser {rows[0].score.normaliser}, real-time factor {speed:.4f}{signature}")  # fmt: skip


def experiment(
    config: Annotated[
        str,
        typer.Argument(
            help="A YAML file, or quick, clean, hard, covost-small, fleurs; for --score-again a directory of results."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of all stages and the report.")],
    data: Annotated[
        str | None, typer.Option(help="Corpus for a configuration that names none: covost2:DIR ...")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these, separated by commas.")] = None,
    rest: Annotated[
        str | None, typer.Option(help="Tensors not decomposed, for all methods: task_arithmetic, average or base.")
    ] = None,
    experts_per: Annotated[
        str | None, typer.Option(help="language, or language_task: an expert for each task of each language.")
    ] = None,
    criterion: Annotated[str | None, typer.Option(help="By what dev chooses: normalised, wer, bleu or loss.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: the configuration's).")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Stages at a time (default: one per core; with cuda one per GPU).")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Run this stage alone.")] = None,
    ray: Annotated[str | None, typer.Option(metavar="local|ADDRESS", help="Run stages on a Ray cluster.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Print the stages and which are done, run nothing.")] = False,
    again: Annotated[
        bool,
        typer.Option(
            "--score-again", help="Scores and tables anew from the answers in CONFIG, a directory of results."
        ),
    ] = False,
) -> None:
    """Fine-tune, merge by every method, score, compare; writes a report, results, all answers, LaTeX and CSV tables.

    lors experiment quick -o quick
    """
    from .experiment.config import load_config
    from .experiment.plan import build_stages, run_experiment
    from .experiment.report import print_tables, score_again

    require_extra()
    given = {"rest": rest, "experts_per": experts_per, "criterion": criterion, "device": device}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if seeds is not None:
        changes["seeds"] = _integers(seeds)
    if again:
        others = {**changes, "data": data, "jobs": jobs, "stage": stage, "ray": ray, "list": show or None}
        if odd := [name for name, value in others.items() if value is not None]:
            raise LorsError(
                f"--score-again: takes a directory of results and --out alone, got --{odd[0].replace('_', '-')}"
            )
        path = score_again(Path(config), out)
        print_tables(out)
        print_lines(f"report: {path}")
        return
    settings = load_config(config, **changes)
    if data is not None:
        section = settings.data.model_copy(update={"source": data, "synth": None})
        settings = settings.model_copy(update={"data": section})
    if show:
        for item in build_stages(settings):
            print_lines(f"{'done' if item.done(out) else '    '}  {item.name}")
        return
    path = run_experiment(settings, out, jobs=jobs, stage=stage, ray=ray, report=print_lines)
    if stage is None:
        print_tables(out)
        print_lines(f"report: {path}")


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise LorsError(f"--seeds: expected numbers separated by commas, got {text!r}") from None


def device_of(device: str | None) -> str:
    if device is not None:
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# What the command line registers, by name.
COMMANDS: dict[str, Callable[..., None]] = {
    "synth": synth,
    "finetune": finetune,
    "evaluate": evaluate,
    "experiment": experiment,
}
