"""Loading Whisper for work on a device, with the errors a user can put right."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...checkpoints.hub import HUB_ID, SHIPPED, SourceNotFound, shipped
from ...checkpoints.reader import open_checkpoint
from ...errors import LorsError, SettingError, first_line, nearest, shown
from ...files import strict_json
from ...files.remote import is_url

__all__ = [
    "DTYPES", "SHIPPED", "gpus", "has_times", "load_model", "load_processor", "local_model", "quiet", "require_languages",
    "resolve_model", "torch_device",
]  # fmt: skip

DTYPES = ("float32", "float16", "bfloat16")


def resolve_model(source: str | Path) -> str:
    """The path, hub id or URL behind a name, where `tiny` and `tiny-early` are the shipped bases; fetches nothing.

    What is local is checked to be a Whisper. LorsError for what can be none of these.
    """
    path = shipped(str(source)) or Path(source)
    if path.exists():
        _check_whisper(path)
        return str(path)
    if is_url(str(source)) or (HUB_ID.fullmatch(str(source)) and not isinstance(source, Path)):
        return str(source)
    looked = "" if path.is_absolute() else f"; looked for in {Path.cwd()}"
    raise SourceNotFound(str(source), f"expected a model directory, a hub id, {' or '.join(SHIPPED)}{looked}")


def local_model(source: str | Path) -> Path:
    """The directory of a Whisper's files on this machine, fetched where it is a hub id or URL; headers are checked."""
    path = Path(_fetched(resolve_model(source)))
    _check_whisper(path)
    return path


@functools.cache
def _fetched(source: str) -> Path:
    with open_checkpoint(source) as checkpoint:
        checkpoint.sidecars()  # transformers would follow, and save, a link that leads elsewhere
        return checkpoint.path


def _check_whisper(path: Path) -> None:
    if not (path / "config.json").exists():
        raise LorsError(f"{path}: expected a model directory with config.json")
    kind = strict_json.read(path / "config.json", infinite=True).get("model_type")
    if kind != "whisper":
        raise LorsError(f"{path}: expected a Whisper checkpoint, got model_type {shown(kind)}")


def load_model(source: str | Path, *, device: str = "cpu", dtype: str = "float32") -> Any:
    """WhisperForConditionalGeneration in evaluation mode on the device.

    LorsError for weights that are missing, of another shape, or not finite: a library that fills them in at random
    would give scores of a model that nobody has.
    """
    import torch
    from transformers import WhisperForConditionalGeneration

    where = torch_device(device)
    path = local_model(source)
    try:
        model, loaded = WhisperForConditionalGeneration.from_pretrained(
            path, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with the tensor's name
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise LorsError(f"{source}: cannot load the model: {first_line(error)}") from error
    for name, found, expected in loaded["mismatched_keys"]:
        raise LorsError(f"{source}: expected {name} of shape {list(expected)}, got {list(found)}")
    if missing := sorted(loaded["missing_keys"]):
        raise LorsError(f"{source}: expected all weights of config.json, {len(missing)} are missing: {missing[0]} ...")
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise LorsError(f"{source}: expected finite weights, got NaN or infinity in {name}")
    return model.to(where).eval()


def load_processor(source: str | Path) -> Any:
    """WhisperProcessor (feature extractor and tokenizer) of a model directory, hub id or URL."""
    from transformers import WhisperProcessor

    path = local_model(source)
    try:
        return WhisperProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise LorsError(
            f"{source}: expected the files of a WhisperProcessor (preprocessor_config.json or processor_config.json, "
            f"tokenizer.json ...) beside the weights, as its base has them: {first_line(error).split('. ')[0]}"
        ) from error


def torch_device(device: str) -> Any:
    """`cpu`, `cuda`, `cuda:1`: the device itself; LorsError when it is not there."""
    import torch

    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise SettingError("device", f"expected cpu or cuda, got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise SettingError("device", f"{device!r} was asked for, and PyTorch {torch.__version__} sees no CUDA device")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise SettingError("device", f"{device!r} was asked for, and there are {count} CUDA devices")
    return chosen


def has_times(model: Any) -> bool:
    """Whether it has tokens for times, which Whisper puts after all others: recordings beyond its window need them."""
    settings = model.generation_config
    last = getattr(settings, "no_timestamps_token_id", None)
    if last is None:
        return False
    languages = (getattr(settings, "lang_to_id", None) or {}).values()  # those that were added follow too
    return len(set(range(last + 1, model.config.vocab_size)).difference(languages)) > 0


def gpus(device: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that `device` means: none for cpu, all that are visible for cuda."""
    import torch

    chosen = torch_device(device)
    if chosen.type == "cpu":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    names = names[: torch.cuda.device_count()]
    return names if chosen.index is None else [names[chosen.index]]


def require_languages(source: str | Path, languages: Iterable[str]) -> None:
    """LorsError naming the first language the model has no token for; reads its generation_config.json, no weights."""
    path = local_model(source) / "generation_config.json"
    if not path.exists():
        raise LorsError(f"{source}: expected a multilingual Whisper: there is no generation_config.json in it")
    known = strict_json.read(path, infinite=True).get("lang_to_id")
    if not isinstance(known, dict):
        raise LorsError(f"{source}: expected a multilingual Whisper, got a generation_config.json without lang_to_id")
    codes = [token[2:-2] for token in known]
    for language in languages:
        if language not in codes:
            raise LorsError(f"{source}: the model has no language {language!r}{nearest(language, codes)}")


def quiet() -> None:
    """Leaves transformers' warnings and loading bars out of a command's output."""
    # Of names that PEFT and transformers still use of each other: nothing a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
