"""The keywords of `lors.merge` and its kin, for type checkers: what a recipe says, as arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

from .parameters import Rest

__all__ = ["Settings"]

# One value; a gradient over the depth; an expert's label -> its value, {filter, value}, or a list of these; not given.
Number: TypeAlias = float | Mapping[str, Any] | Sequence[float | Mapping[str, Any]] | None
Flag: TypeAlias = bool | Mapping[str, Any] | Sequence[bool | Mapping[str, Any]] | None
Dtype: TypeAlias = Literal["float32", "float16", "bfloat16"]


class Settings(TypedDict, total=False):
    """All that a recipe may say besides its models and its method; parameters of every method (`docs/methods.md`)."""

    name: str | None
    target: Mapping[str, Sequence[str]] | None
    rest: Rest | None
    vocabulary: Literal["base", "union"]
    seed: int
    dtype: Dtype | None
    out_dtype: Dtype | None
    out_shard_size: str | int | None

    lam: Number
    rest_lambda: Number
    weight: Number
    rank: Number
    density: Number
    boost: Number
    boost_merged: Number
    alpha: Number
    common: Number
    epsilon: Number
    filter_wise: Flag
    gamma: Number
    int8_mask: Flag
    normalize: Flag
    orthogonal: Flag
    rescale: Flag
    ridge: Number
    sparse_weight: Number
    statistics: str | Mapping[str, Any] | None
    t: Number
    towards: str | None
