"""The configuration of an experiment: a YAML file, checked before anything runs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ...errors import LorsError, nearest
from ...methods import SPECS
from ...recipes import strict_yaml
from ..data.languages import whisper_code
from ..learning import FORMS
from ..training.settings import Training
from .criterion import CRITERIA
from .merged import has_rest
from .variants import VARIANTS

__all__ = ["Config", "Expert", "Grid", "Setting", "load_config", "shipped_configs"]

_SHIPPED = Path(__file__).parent.parent / "configs"

Setting = dict[str, Any]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Synthesis(_Section):
    """A corpus by espeak-ng; sizes are utterances per language."""

    condition: Literal["clean", "hard"]
    seed: int = 0


class Data(_Section):
    """Where speech comes from (`source` as for `load_corpus`, or `synth`) and how much of it, per language."""

    synth: Synthesis | None = None
    source: str | None = None
    train: int | None = Field(default=None, ge=1)
    dev: int = Field(default=100, ge=1)
    test: int | None = Field(default=None, ge=1)
    max_seconds: float | None = Field(default=None, gt=0)
    sample_seed: int = 0  # which utterances, where `source` has more

    @model_validator(mode="after")
    def _one(self) -> Data:
        if self.synth is not None and (self.train is None or self.test is None):
            raise ValueError("synth needs the sizes train and test")
        return self


class Heard(_Section):
    """What a method is given of training recordings without texts: `lors calibrate`'s statistics, or `lors learn`'s weights of
    some `parts`."""

    gives: Literal["statistics", "weights"]
    utterances: int = Field(default=100, ge=1)  # per expert
    plus: bool = False  # of statistics
    parts: Literal["delta", "apart", "orthogonal"] = "delta"
    steps: int = Field(default=120, ge=1)


class Halving(_Section):
    """A search in two rounds: all settings on `dev` utterances of each language, the best `keep` of them on all of dev."""

    dev: int = Field(ge=1)
    keep: int = Field(ge=1)


class Grid(_Section):
    """A merge method and the values tried for each of its parameters (every combination).

    calibrated: what speech of the languages the method has seen besides the experts, in words; None: none. heard: how it comes
    to that, where the experiment is to see to it.
    """

    method: str
    parameters: dict[str, list[Any]] = {}
    calibrated: str | None = None
    heard: Heard | None = None

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        known = [*SPECS, *VARIANTS]
        if method not in known:
            raise ValueError(f"unknown method {method!r}{nearest(method, known)}")
        return method

    @model_validator(mode="after")
    def _of_the_method(self) -> Grid:
        known = (
            [*(spec.name for spec in SPECS[self.method].parameters), "lam"] if self.method in SPECS else self.parameters
        )
        for name in self.parameters:
            if name not in known:
                raise ValueError(f"{self.method} has no parameter {name!r}{nearest(name, known)}")
        if self.heard is not None and self.calibrated is None:
            raise ValueError("heard: expected calibrated, which says in words what was heard")
        if self.heard is not None and self.heard.gives == "weights" and self.method != FORMS[self.heard.parts].method:
            raise ValueError(
                f"weights of {self.heard.parts} are of {FORMS[self.heard.parts].method}, not {self.method}"
            )
        return self

    def settings(self) -> list[Setting]:
        """Every combination, in the order of the lists."""
        names = list(self.parameters)
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*self.parameters.values())]


class Expert(NamedTuple):
    """What one expert is trained on."""

    name: str
    language: str
    tasks: tuple[str, ...]


class Config(_Section):
    """One experiment. `grids` maps a label in the report to a method and its values."""

    name: str
    base: str
    data: Data
    experts: tuple[str, ...] = Field(min_length=1)  # languages
    experts_per: Literal["language", "language_task"] = "language"  # an expert of all tasks, or one of each
    languages: tuple[str, ...] = Field(min_length=1)
    tasks: tuple[Literal["transcribe", "translate"], ...] = ("transcribe",)
    training: dict[str, Any] = {}
    multi_task_steps: int | None = Field(default=None, ge=1)  # None: no such baseline
    sequential_steps: int | None = Field(default=None, ge=1)  # per language
    seeds: tuple[int, ...] = (0,)
    rest: Literal["task_arithmetic", "average", "base"] = "task_arithmetic"
    rest_lambda: tuple[float, ...] = ()  # factors of these tensors, tried with every setting of every method
    compare_rest: bool = False  # also try the other two values, each method at its best setting, first seed
    criterion: Literal["normalised", "wer", "bleu", "loss"] = "normalised"  # on dev, see `criterion`
    halving: Halving | None = None  # None: every setting on all of dev
    against: str = "task_arithmetic"  # the label all merges are compared with
    grids: dict[str, Grid] = {}
    batch_size: int = Field(default=64, ge=1)
    device: str = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = (
        "float32"  # of decoding; merges are float32, training has its own
    )
    beams: int = Field(default=1, ge=1)  # 1: greedy
    normaliser: Literal["whisper", "marks"] = "whisper"

    @field_validator("experts", "languages")
    @classmethod
    def _codes(cls, codes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(whisper_code(code) for code in codes)

    @model_validator(mode="after")
    def _fair(self) -> Config:
        strangers = [language for language in self.experts if language not in self.languages]
        if strangers:
            raise ValueError(f"languages: expected all of the experts' languages, {strangers[0]!r} is missing")
        if not set(CRITERIA[self.criterion].tasks) <= set(self.tasks):
            raise ValueError(f"criterion: {self.criterion!r} is of {CRITERIA[self.criterion].tasks[0]}, no task here")
        if self.rest == "base" and self.rest_lambda:
            raise ValueError("rest_lambda: expected none with rest base, which adds nothing to these tensors")
        if self.halving is not None and self.halving.dev >= self.data.dev:
            raise ValueError(
                f"halving: expected fewer than the {self.data.dev} utterances of dev, got {self.halving.dev}"
            )
        sizes = {label: len(grid.settings()) for label, grid in self.grids.items()}
        # Equal budgets, or the method with more tries looks better than it is. A method without parameters has one.
        if len({size for size in sizes.values() if size > 1}) > 1:
            raise ValueError(f"grids: expected the same number of settings for every method, got {sizes}")
        if self.grids and self.against not in self.grids:
            raise ValueError(f"against: {self.against!r} is none of the grids {', '.join(self.grids)}")
        return self

    def settings(self, label: str) -> list[Setting]:
        """All that is tried of a grid."""
        settings = self.grids[label].settings()
        if not self.rest_lambda or not has_rest(self.grids[label].method):
            return settings
        return [{**setting, "rest_lambda": factor} for setting in settings for factor in self.rest_lambda]

    def trained(self) -> list[Expert]:
        """The experts, one per language or one per language and task."""
        if self.experts_per == "language":
            return [Expert(language, language, self.tasks) for language in self.experts]
        return [Expert(f"{language}-{task}", language, (task,)) for language in self.experts for task in self.tasks]

    def make_training(self, seed: int, **changes: Any) -> Training:
        return Training(**{**self.training, "device": self.device, "seed": seed, **changes})


def shipped_configs() -> list[str]:
    """Names that `load_config` takes besides paths."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yml"))


def load_config(source: str | Path, **changes: Any) -> Config:
    """A YAML file, or the name of a shipped configuration; `changes` replace top-level keys."""
    path = Path(source)
    # A directory of that name is the output of the first run: the same command again must find the configuration.
    if not path.is_file() and str(source) in shipped_configs():
        path = _SHIPPED / f"{source}.yml"
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        known = ", ".join(shipped_configs())
        raise LorsError(f"{source}: there is no such file; shipped configurations: {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LorsError(f"cannot read {source}: {getattr(error, 'strerror', None) or error}") from error
    document = strict_yaml.parse(text, str(path))
    if not isinstance(document, dict):
        raise LorsError(f"{path}: expected a mapping, got {type(document).__name__}")
    try:
        config = Config(**{**document, **changes})
        config.make_training(0)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "configuration"
        raise LorsError(f"{path}: {where}: {first['msg']}") from error
    except (TypeError, LorsError) as error:
        raise LorsError(f"{path}: training: {error}") from error
    return config
