"""The parts of a recipe: its models, the target, sizes."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..checkpoints.layers import compile_patterns
from ..errors import shown
from .parameters import Setting

__all__ = ["ModelEntry", "Target", "parse_size"]

DType: TypeAlias = Literal["float32", "float16", "bfloat16"]


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


class Target(Document):
    """Which matrices are decomposed; `layers.select` says how the three keys work together."""

    select: Literal["projections", "attention", "mlp"] = "projections"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        if value is None or isinstance(value, str):
            return () if value is None else (value,)
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _consistent(self) -> Target:
        if self.include and self.select != "projections":
            raise ValueError("expected 'select' or 'include', got both")
        compile_patterns(self.include, "target.include")
        compile_patterns(self.exclude, "target.exclude")
        return self


class ModelEntry(Document):
    """One item of `models`: where it is, what to call it, its own parameters."""

    model: str = Field(min_length=1)
    name: str | None = None
    parameters: dict[str, Setting] = {}

    @field_validator("name")
    @classmethod
    def _short(cls, value: str | None) -> str | None:
        if value is not None and not (0 < len(value) <= 80 and value.isprintable() and value == value.strip()):
            raise ValueError(f"expected a short label of one line, got {shown(value)}")
        return value


_UNITS = {"": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)}


def parse_size(text: object) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number; ValueError if it is none of these or less than one byte."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ValueError(f"expected a size such as '5GB' or '500MB', got {shown(text)}")
    return size
