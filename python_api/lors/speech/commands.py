"""The `lors` sub-commands on speech. Imported by the command line only when one of them is called."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..command import Inputs, Json, Machine, Output, Quiet, Settings, as_options, hushed
from ..errors import LorsError, print_lines, printable
from .data.left_out import SHARE, LeftOut

if TYPE_CHECKING:
    from .scoring.evaluation import Evaluation

__all__ = ["COMMANDS", "OPTIONS", "evaluate", "experiment", "finetune", "require_extra", "synth"]

EXTRA = ("transformers", "accelerate", "jiwer", "sacrebleu", "soundfile", "soxr", "num2words", "babel")

# What several of the commands take.
Cache = Annotated[Path | None, Machine(help="Keep features in this directory.")]
Data = Annotated[
    str,
    Inputs(help="Manifest, covost2:DIR, common_voice:DIR, fleurs:[DIR] or datasets:NAME,KEY=VALUE (docs/speech.md)."),
]
Device = Annotated[str | None, Machine(help="cpu or cuda (default: cuda where there is one).")]
Limit = Annotated[int | None, Inputs(metavar="N", min=1, help="Utterances per language.")]
MaxSeconds = Annotated[float | None, Inputs(metavar="SECONDS", min=0, help="Leave out longer recordings.")]
SampleSeed = Annotated[int, Inputs(help="Which utterances --limit takes.")]
Tasks = Annotated[str, Inputs(help="transcribe, translate or both.")]
Unusable = Annotated[
    float, Inputs(metavar="SHARE", min=0, max=1, help="Share of rows and recordings that may be unreadable; 0: none.")
]
Workers = Annotated[
    int | None,
    Machine(metavar="N", min=0, help="Processes that compute features (default: none on cpu, up to 8 for a GPU)."),
]

# Names of transformers' example script, and of earlier versions, that are taken too -> ours.
_ALIASES = {
    "model-name-or-path": "model", "output-dir": "out", "language": "languages", "task": "tasks",
    "per-device-train-batch-size": "batch-size", "gradient-accumulation-steps": "accumulation",
    "lr-scheduler-type": "scheduler", "early-stopping-patience": "patience", "max-train-samples": "limit",
    "max-duration-in-seconds": "max-seconds", "metric-for-best-model": "best", "generation-num-beams": "beams",
    "label-smoothing-factor": "smoothing", "apply-spec-augment": "augment", "dataloader-num-workers": "workers",
}  # fmt: skip


def _ours(name: str) -> str:
    """An option as help shows it."""
    plain = name.replace("_", "-")
    return _ALIASES.get(plain, plain)


# What a command is registered with, beside its name.
OPTIONS: dict[str, dict[str, Any]] = dict.fromkeys(
    ("finetune", "evaluate"), {"context_settings": {"token_normalize_func": _ours}}
)


def require_extra() -> None:
    """LorsError that names what is absent of the `speech` extra: before the work, not in the midst of it."""
    from importlib.util import find_spec

    absent = [module for module in EXTRA if find_spec(module) is None]
    if absent:
        raise LorsError(f"speech needs {', '.join(absent)}: pip install 'lors-merging[speech]'")


def synth(
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    languages: Annotated[str, Settings(help="Codes, separated by commas.")] = "ca,de,es,fr,it,id,nl,pt,ru,sv",
    train: Annotated[int, Settings(metavar="N", min=0, help="Utterances per language.")] = 1000,
    dev: Annotated[int, Settings(metavar="N", min=0, help="Utterances per language.")] = 100,
    test: Annotated[int, Settings(metavar="N", min=0, help="Utterances per language.")] = 200,
    condition: Annotated[str, Settings(help="clean or hard (other voices, faster, 0 to 10 dB SNR).")] = "clean",
    seed: Annotated[int, Settings(help="Of sentences and voices.")] = 0,
    workers: Annotated[
        int | None, Machine(metavar="N", min=1, help="Processes of espeak-ng at a time (default: cores).")
    ] = None,
    audio_format: Annotated[str, Output("--format", help="flac or wav.")] = "flac",
    force: Annotated[bool, Output("--force", help="Write over a corpus in OUT.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a speech corpus with translations by espeak-ng: audio files and manifest.tsv."""
    from .data.languages import parse_languages
    from .data.synth import synthesise

    require_extra()
    codes = parse_languages(languages)
    sizes = {split: size for split, size in (("train", train), ("dev", dev), ("test", test)) if size}
    manifest = synthesise(
        out, languages=codes, sizes=sizes, condition=condition, seed=seed, audio_format=audio_format, workers=workers,
        force=force, progress=not quiet,
    )  # fmt: skip
    total = len(codes) * sum(sizes.values())
    if as_json:
        print(json.dumps({"manifest": str(manifest), "utterances": total, "languages": codes, "splits": sizes}))
    elif not quiet:
        print_lines(f"{total} utterances -> {manifest}")


def finetune(
    *,
    model: Annotated[str, Inputs(help="Directory, hub id, tiny or tiny-early.")],
    data: Data,
    languages: Annotated[str, Inputs(help="One code: an expert; several with commas: multi-task.")],
    tasks: Tasks = "transcribe",
    dev: Annotated[str | None, Inputs(help="Corpus whose split dev is used (default: --data).")] = None,
    limit: Limit = None,
    max_seconds: MaxSeconds = None,
    sample_seed: SampleSeed = 0,
    unusable: Unusable = SHARE,
    train: Annotated[str, Settings(help="Weights trained: all, matrices or lora.")] = "all",
    sequential: Annotated[bool, Settings("--sequential", help="One language after another, not mixed.")] = False,
    max_steps: Annotated[int, Settings(metavar="N", min=1, help="Updates of the weights.")] = 1000,
    batch_size: Annotated[int, Settings(metavar="N", min=1, help="Utterances at a time.")] = 16,
    accumulation: Annotated[int, Settings(metavar="N", min=1, help="Batches per update.")] = 1,
    learning_rate: Annotated[float, Settings(metavar="X", min=0, help="Greatest step size.")] = 1e-5,
    warmup_steps: Annotated[int, Settings(metavar="N", min=0, help="Updates until it is reached.")] = 0,
    scheduler: Annotated[str, Settings(help="What it does then: linear, cosine, constant ...")] = "linear",
    weight_decay: Annotated[float, Settings(metavar="X", min=0, help="Of AdamW.")] = 0.0,
    smoothing: Annotated[float, Settings(metavar="X", min=0, help="Of labels.")] = 0.0,
    dropout: Annotated[float, Settings(metavar="X", min=0, help="While training.")] = 0.0,
    augment: Annotated[bool, Settings("--augment", help="Hide parts of the features while training.")] = False,
    freeze_encoder: Annotated[bool, Settings("--freeze-encoder", help="Train the decoder only.")] = False,
    lora_rank: Annotated[int, Settings(metavar="N", min=1, help="With --train lora.")] = 8,
    lora_alpha: Annotated[int, Settings(metavar="N", min=1, help="With --train lora.")] = 16,
    save_steps: Annotated[int, Settings(metavar="N", min=1, help="Updates between checkpoints.")] = 500,
    eval_steps: Annotated[
        int | None, Settings(metavar="N", min=1, help="Measure dev this often; keep the best.")
    ] = None,
    best: Annotated[str, Settings(help="By this of dev: wer, bleu or loss.")] = "wer",
    patience: Annotated[
        int | None, Settings(metavar="N", min=1, help="Stop after so many measurements without a better.")
    ] = None,
    beams: Annotated[int, Settings(metavar="N", min=1, help="Of decoding dev; 1: greedy.")] = 1,
    seed: Annotated[int, Settings(help="Of order and initialisation.")] = 0,
    device: Device = None,
    bf16: Annotated[bool, Machine("--bf16", help="Mixed precision.")] = False,
    fp16: Annotated[bool, Machine("--fp16", help="Mixed precision, on GPUs without bfloat16.")] = False,
    gradient_checkpointing: Annotated[
        bool, Machine("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    optim: Annotated[str, Machine(help="adamw_torch_fused, adafactor, or adamw_8bit.")] = "adamw_torch_fused",
    workers: Workers = None,
    cache: Cache = None,
    out: Annotated[Path, Output("--out", "-o", help="Directory to write.")],
    report_to: Annotated[str, Output(help="none, tensorboard or wandb.")] = "none",
    force: Annotated[bool, Output("--force", help="Replace OUT.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune Whisper into an expert or a multi-task model; a killed run continues when started again.

    lors finetune --model openai/whisper-small --data corpus/ --languages ca -o ca

    The names of transformers' example script are taken too: --output_dir, --lr_scheduler_type ...
    """
    from .training.finetune import finetune as run
    from .training.finetune import first_process
    from .training.settings import Training

    require_extra()
    with as_options(lambda: {theirs.replace("-", "_"): f"--{ours}" for theirs, ours in _ALIASES.items()}):
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
            model, out, data=data, languages=languages, tasks=tasks, training=training, dev=dev, limit=limit,
            max_seconds=max_seconds, sample_seed=sample_seed, unusable=unusable, sequential=sequential, cache=cache,
            force=force, progress=not quiet,
        )  # fmt: skip
    if not first_process():
        return
    if as_json:
        from dataclasses import asdict

        print(json.dumps({**asdict(result), "path": str(result.path)}))
    elif not quiet:
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
    data: Data,
    languages: Annotated[str, Inputs(help="Codes, separated by commas.")],
    tasks: Tasks = "transcribe",
    split: Annotated[str, Inputs(help="train, dev or test.")] = "test",
    limit: Limit = None,
    max_seconds: MaxSeconds = None,
    sample_seed: SampleSeed = 0,
    unusable: Unusable = SHARE,
    batch_size: Annotated[int, Settings(metavar="N", min=1, help="Utterances at a time.")] = 64,
    beams: Annotated[int, Settings(metavar="N", min=1, help="Of decoding; 1: greedy.")] = 1,
    normaliser: Annotated[
        str, Settings(help="whisper, or marks: the same, but combining marks stay (Tamil, Hindi, Thai ...).")
    ] = "whisper",
    compare: Annotated[str | None, Settings(metavar="A,B", help="Paired bootstrap between two of the models.")] = None,
    device: Device = None,
    dtype: Annotated[str, Machine(help="float32, float16 or bfloat16.")] = "float32",
    workers: Workers = None,
    cache: Cache = None,
    out: Annotated[Path | None, Output("--out", "-o", help="Write scores.json and every answer here.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score models on languages and tasks: WER, CER, BLEU, chrF++.

    lors evaluate base merged --data corpus/ --languages ca,de --compare base,merged
    """
    from .data.languages import language_name, parse_languages
    from .data.utterance import parse_tasks
    from .scoring.evaluation import evaluate as run
    from .scoring.evaluation import make_room, model_names

    require_extra()
    # All that can be wrong is looked at before hours of decoding.
    if odd := [model for model in models if not Path(model).exists() and language_name(model) != model]:
        codes = ",".join((languages, *odd))
        raise LorsError(
            f"evaluate: expected models, got the language {odd[0]!r}; separate languages by commas: --languages {codes}"
        )
    wanted, chosen = parse_languages(languages), parse_tasks(tasks)
    pair = None if compare is None else _pair(compare, model_names(models))
    if out is not None:
        make_room(out)
    evaluation = run(
        models, data=data, languages=wanted, tasks=chosen, split=split, limit=limit, max_seconds=max_seconds,
        batch_size=batch_size, beams=beams, device=device_of(device), dtype=dtype, cache=cache, workers=workers,
        sample_seed=sample_seed, unusable=unusable, normaliser=normaliser, progress=not quiet,
    )  # fmt: skip
    if out is not None:
        evaluation.write(out)
    compared = [] if pair is None else [_compared(evaluation, *pair, task) for task in chosen]
    if as_json:
        from dataclasses import asdict

        found = {"scores": evaluation.rows(), "comparisons": compared, "left_out": asdict(evaluation.left_out)}
        print(json.dumps(found, indent=1))
    elif not quiet:
        show_evaluation(evaluation)
        _tell(evaluation.left_out)
        for c in compared:
            print_lines("{task}: {metric} of {first} minus {second}: {difference:+.2f} "
                  "[{low:+.2f}, {high:+.2f}] (95 %, paired bootstrap)".format(**c))  # fmt: skip


def _pair(text: str, known: Sequence[str]) -> tuple[str, str]:
    first, _, second = text.partition(",")
    for name in (first, second):
        if name not in known:
            raise LorsError(f"--compare: expected A,B of the models {', '.join(known)}, got {text!r}")
    return first, second


def _compared(evaluation: Evaluation, first: str, second: str, task: str) -> dict[str, Any]:
    from .scoring.evaluation import compare

    metric = "wer" if task == "transcribe" else "bleu"
    interval = compare(evaluation, first, second, task=task, metric=metric)
    return {
        "task": task, "metric": metric.upper(), "first": first, "second": second, "difference": interval.difference,
        "low": interval.low, "high": interval.high, "p": interval.p,
    }  # fmt: skip


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
    *,
    data: Annotated[str | None, Inputs(help="Corpus for a configuration that names none: covost2:DIR ...")] = None,
    again: Annotated[
        bool, Inputs("--score-again", help="Scores and tables anew from the answers in CONFIG, a directory of results.")
    ] = False,
    seeds: Annotated[str | None, Settings(help="Only these, separated by commas.")] = None,
    rest: Annotated[
        str | None, Settings(help="Tensors not decomposed, for all methods: task_arithmetic, average or base.")
    ] = None,
    experts_per: Annotated[
        str | None, Settings(help="language, or language_task: an expert for each task of each language.")
    ] = None,
    criterion: Annotated[str | None, Settings(help="By what dev chooses: normalised, wer, bleu or loss.")] = None,
    stage: Annotated[str | None, Settings(help="Run this stage alone.")] = None,
    show: Annotated[bool, Settings("--list", help="Print the stages and which are done, run nothing.")] = False,
    device: Annotated[str | None, Machine(help="cpu or cuda (default: the configuration's).")] = None,
    jobs: Annotated[
        int | None, Machine(metavar="N", min=1, help="Stages at a time (default: one per core; with cuda one per GPU).")
    ] = None,
    ray: Annotated[str | None, Machine(metavar="local|ADDRESS", help="Run stages on a Ray cluster.")] = None,
    out: Annotated[Path, Output("--out", "-o", help="Directory of all stages and the report.")],
    as_json: Json = False,
    quiet: Quiet = False,
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
    path: Path | None = None
    with hushed(quiet or as_json):
        if again:
            others = {**changes, "data": data, "jobs": jobs, "stage": stage, "ray": ray, "list": show or None}
            if odd := [name for name, value in others.items() if value is not None]:
                raise LorsError(
                    f"--score-again: takes a directory of results and --out alone, got --{odd[0].replace('_', '-')}"
                )
            path = score_again(Path(config), out)
        else:
            settings = load_config(config, **changes)
            if data is not None:
                section = settings.data.model_copy(update={"source": data, "synth": None})
                settings = settings.model_copy(update={"data": section})
            if show:
                stages = {item.name: item.done(out) for item in build_stages(settings)}
                print_lines(*(f"{'done' if done else '    '}  {name}" for name, done in stages.items()))
            else:
                path = run_experiment(settings, out, jobs=jobs, stage=stage, ray=ray, report=print_lines)
        if path is not None and stage is None:
            print_tables(out)
            print_lines(f"report: {path}")
    if as_json and show:
        print(json.dumps(stages, indent=1))
    elif as_json and stage is None:
        print((out / "results.json").read_text("utf-8"), end="")


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
