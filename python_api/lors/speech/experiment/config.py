"""The configuration of an experiment: a YAML file, checked before anything runs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ...errors import LorsError, nearest
from ...methods import SPECS
from ...recipes import strict_yaml
from ..data.languages import whisper_code
from ..training.settings import Training
from .variants import VARIANTS

__all__ = ["Config", "Grid", "Setting", "load_config", "shipped_configs"]

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


class Grid(_Section):
    """A merge method and the values tried for each of its parameters (every combination)."""

    method: str
    parameters: dict[str, list[Any]] = {}

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        known = [*SPECS, *VARIANTS]
        if method not in known:
            raise ValueError(f"unknown method {method!r}{nearest(method, known)}")
        return method

    def settings(self) -> list[Setting]:
        """Every combination, in the order of the lists."""
        names = list(self.parameters)
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*self.parameters.values())]


class Config(_Section):
    """One experiment. `grids` maps a label in the report to a method and its values."""

    name: str
    base: str
    data: Data
    experts: tuple[str, ...] = Field(min_length=1)
    languages: tuple[str, ...] = Field(min_length=1)
    tasks: tuple[Literal["transcribe", "translate"], ...] = ("transcribe",)
    training: dict[str, Any] = {}
    multi_task_steps: int | None = Field(default=None, ge=1)  # None: no such baseline
    sequential_steps: int | None = Field(default=None, ge=1)  # per language
    seeds: tuple[int, ...] = (0,)
    rest: Literal["task_arithmetic", "average", "base"] = "task_arithmetic"
    compare_rest: bool = False  # also try the other two values, each method at its best setting, first seed
    against: str = "task_arithmetic"  # the label all merges are compared with
    grids: dict[str, Grid] = {}
    batch_size: int = Field(default=64, ge=1)
    beams: int = Field(default=1, ge=1)  # of decoding dev and test; 1: greedy
    device: str = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of decoding; merges are float32, training has bf16

    @field_validator("experts", "languages")
    @classmethod
    def _codes(cls, codes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(whisper_code(code) for code in codes)

    @model_validator(mode="after")
    def _fair(self) -> Config:
        strangers = [language for language in self.experts if language not in self.languages]
        if strangers:
            raise ValueError(f"languages: expected all of the experts' languages, {strangers[0]!r} is missing")
        sizes = {label: len(grid.settings()) for label, grid in self.grids.items()}
        # Equal budgets, or the method with more tries looks better than it is. A method without parameters has one.
        if len({size for size in sizes.values() if size > 1}) > 1:
            raise ValueError(f"grids: expected the same number of settings for every method, got {sizes}")
        if self.grids and self.against not in self.grids:
            raise ValueError(f"against: {self.against!r} is none of the grids {', '.join(self.grids)}")
        return self

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
