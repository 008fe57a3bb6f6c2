"""How to train, and the record of it on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...errors import SettingError, nearest
from ...files.writing import replacing

__all__ = ["TRAIN", "Training", "write_json"]

TRAIN = ("all", "matrices", "lora")
BEST = ("wer", "bleu", "loss")
OPTIMISERS = {"adamw_torch_fused": None, "adafactor": None, "adamw_8bit": "bitsandbytes"}  # and what they need
REPORTS = {"none": None, "tensorboard": "tensorboard", "wandb": "wandb"}
SCHEDULERS = (  # those that need no further settings
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)
_POSITIVE = (
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "save_steps", "eval_steps"),
    *("early_stopping_patience", "lora_rank", "lora_alpha", "generation_num_beams"),
)

_LATER = {
    *("dataloader_num_workers", "metric_for_best_model", "label_smoothing_factor", "dropout"),
    *("apply_spec_augment", "freeze_encoder", "fp16", "optim", "report_to", "generation_num_beams"),
}
_ELSEWHERE = {"device", "dataloader_num_workers", "report_to"}


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
    dataloader_num_workers: int | None = None  # processes that compute features; None: none on cpu, up to 8 for a GPU
    metric_for_best_model: str = "wer"  # on dev: "wer", "bleu" of translation, or "loss"
    generation_num_beams: int = 1  # on dev
    label_smoothing_factor: float = 0.0
    dropout: float = 0.0
    apply_spec_augment: bool = False  # hides a twentieth of the frames, as the configuration of the model says
    freeze_encoder: bool = False
    fp16: bool = False
    optim: str = "adamw_torch_fused"
    report_to: str = "none"

    def __post_init__(self) -> None:
        if self.train not in TRAIN:
            raise SettingError("train", f"expected {', '.join(TRAIN)}, got {self.train!r}{nearest(self.train, TRAIN)}")
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise SettingError("early_stopping_patience", "expected eval_steps, got none")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise SettingError(name, f"expected an integer of at least 1, got {value!r}")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 < value < float("inf")):
                raise SettingError(name, f"expected a positive number, got {value!r}")
        for name in ("label_smoothing_factor", "dropout"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 <= value < 1):
                raise SettingError(name, f"expected a number from 0 to below 1, got {value!r}")
        for name, choices in (("metric_for_best_model", BEST), ("optim", OPTIMISERS), ("report_to", REPORTS)):
            value = getattr(self, name)
            if value not in choices:
                raise SettingError(name, f"expected {', '.join(choices)}, got {value!r}{nearest(value, choices)}")
        if self.fp16 and (self.bf16 or self.device == "cpu"):
            raise SettingError("fp16", f"expected a GPU and no bf16, got device {self.device!r}, bf16 {self.bf16}")
        if self.freeze_encoder and self.train != "all":
            raise SettingError(
                "freeze_encoder", f"expected train 'all', got {self.train!r}, which says itself what is trained"
            )
        if self.lr_scheduler_type not in SCHEDULERS:
            known = nearest(self.lr_scheduler_type, SCHEDULERS)
            raise SettingError("lr_scheduler_type", f"no {self.lr_scheduler_type!r}{known}")
        workers = self.dataloader_num_workers
        if workers is not None and not (isinstance(workers, int) and workers >= 0):
            raise SettingError("dataloader_num_workers", f"expected an integer of at least 0, got {workers!r}")
        if self.device not in ("cpu", "cuda"):
            raise SettingError(
                "device", f"training takes cpu or cuda (CUDA_VISIBLE_DEVICES chooses), got {self.device!r}"
            )

    def require_packages(self) -> None:
        """LorsError that names what is not installed here and is needed for these settings alone."""
        for name, package in (("optim", OPTIMISERS[self.optim]), ("report_to", REPORTS[self.report_to])):
            if package is not None and find_spec(package) is None:
                raise SettingError(name, f"{getattr(self, name)} needs {package}: pip install {package}")

    def record(self) -> dict[str, Any]:
        """All of it; of what was added after the first release only what is not the default, so that keys of stages stay."""
        later = {f.name: f.default for f in fields(self) if f.name in _LATER}
        return {k: v for k, v in asdict(self).items() if k not in later or v != later[k]}

    def identity(self) -> dict[str, Any]:
        """What the trained weights depend on: a run may continue on another device, or with more workers."""
        return {k: v for k, v in self.record().items() if k not in _ELSEWHERE}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes the file, which is there whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
