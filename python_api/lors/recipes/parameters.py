"""Parameters of merge methods: what a method declares, and what a recipe says.

A method declares `ParameterSpec`s in a `MethodSpec`; it needs nothing else of this package. A recipe gives a `Setting`
per parameter, whose value depends on the tensor: its name (filters) and its depth (gradients).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias

from ..errors import SettingError, nearest, shown

__all__ = [
    "BOOST",
    "BOOST_MERGED",
    "REQUIRED",
    "REST_LAMBDA",
    "Condition",
    "MethodSpec",
    "ParameterSpec",
    "Setting",
    "rank_of",
]

Scalar: TypeAlias = bool | int | float | str
Value: TypeAlias = Scalar | tuple[Scalar, ...]  # a tuple is a gradient over depth


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()  # the default of a parameter that has none


# --- what a method declares ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of a method.

    kind: "float", "int", "bool", "str", "path" (of a file, looked up as models are), or "rank" (an integer >= 1, or a fraction of
        min(m, n) below 1; see `rank_of`).
    default: None is no value, where a method goes by something else then. minimum, maximum: inclusive bounds of a number.
    choices: the allowed strings.
    scope: "model" may differ between experts; "global" is one value for the merge, refused under `models[i]`.
    """

    name: str
    kind: Literal["float", "int", "bool", "str", "path", "rank"] = "float"
    default: Scalar | _Required | None = REQUIRED
    minimum: float | None = None
    maximum: float | None = None
    scope: Literal["model", "global"] = "model"
    help: str = ""
    choices: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """What a value has to be, in words."""
        if self.kind == "rank":
            return "an integer >= 1 or a fraction of min(m, n) between 0 and 1"
        if self.kind == "bool":
            return "true or false"
        if self.kind == "path":
            return "the path of a file"
        if self.kind == "str":
            return "one of " + ", ".join(self.choices) if self.choices else "a string"
        noun = "a number" if self.kind == "float" else "an integer"
        if self.minimum is not None and self.maximum is not None:
            return f"{noun} in [{self.minimum:g}, {self.maximum:g}]"
        if self.minimum is not None:
            return f"{noun} >= {self.minimum:g}"
        return noun if self.maximum is None else f"{noun} <= {self.maximum:g}"

    def check(self, value: object) -> Scalar:
        """The value in this parameter's type; ValueError (expected, got) if it is not one."""
        checked = _CHECKS[self.kind](self, value)
        if checked is None:
            raise ValueError(f"expected {self.expected}, got {shown(value)}")
        if isinstance(checked, float) and not abs(checked) <= LARGEST:
            raise ValueError(f"expected a number that float32 can hold, got {shown(value)}")
        return checked

    def settle(self, value: Scalar) -> Scalar:
        """Between the points of a gradient an integer is rounded, halves upwards; other values stay."""
        counts = self.kind == "int" or (self.kind == "rank" and not isinstance(value, str) and value >= 1)
        return math.floor(float(value) + 0.5) if counts else value


LARGEST = (2 - 2**-23) * 2.0**127  # of float32, in which weights and sums are

Rest: TypeAlias = Literal["task_arithmetic", "average", "base"]
# Parameters of every method that has a target.
REST_LAMBDA, BOOST, BOOST_MERGED = "rest_lambda", "boost", "boost_merged"


@dataclass(frozen=True)
class MethodSpec:
    """What a recipe has to know of a merge method.

    base: must `base_model` be given? min_experts, max_experts: how many models besides the base it merges. rest: what
    becomes of the tensors it does not decompose, where the recipe does not say.
    """

    name: str
    parameters: tuple[ParameterSpec, ...] = ()
    base: Literal["required", "optional"] = "required"
    min_experts: int = 1
    max_experts: int | None = None
    rest: Rest = "task_arithmetic"

    def parameter(self, name: str) -> ParameterSpec | None:
        return next((spec for spec in self.parameters if spec.name == name), None)


def rank_of(value: float, m: int, n: int) -> int:
    """Rank for an m x n matrix of a "rank" value: the value itself from 1 on, max(1, int(value * min(m, n))) below.

    ValueError when it exceeds min(m, n).
    """
    rank = max(1, int(value * min(m, n))) if value < 1 else int(value)
    if rank > min(m, n):
        raise ValueError(f"rank: expected at most min(m, n) = {min(m, n)} for a {m} x {n} matrix, got {rank}")
    return rank


_DECIMAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", re.ASCII)


def _number(value: object) -> int | float | None:
    # PyYAML reads 1e-3 (no dot) as a string; mergekit takes it for the number that was meant, and so do we.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and not _DECIMAL.fullmatch(value):
        return None  # float() would take 1_000 too
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _check_float(spec: ParameterSpec, value: object) -> float | None:
    number = _number(value)
    if number is None or (spec.minimum is not None and number < spec.minimum):
        return None
    return number if spec.maximum is None or number <= spec.maximum else None


def _check_int(spec: ParameterSpec, value: object) -> int | None:
    number = _check_float(spec, value)
    return int(number) if number is not None and number == int(number) else None


def _check_rank(spec: ParameterSpec, value: object) -> int | float | None:
    number = _number(value)
    if number is None or number <= 0:
        return None
    if number < 1:
        return number
    return int(number) if number == int(number) else None


def _check_bool(spec: ParameterSpec, value: object) -> bool | None:
    # 0 and 1 too: recipes written for older mergekit say `normalize: 1.0`
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def _check_str(spec: ParameterSpec, value: object) -> str | None:
    return value if isinstance(value, str) and (not spec.choices or value in spec.choices) else None


_CHECKS: dict[str, Callable[[ParameterSpec, object], Scalar | None]] = {
    "float": _check_float,
    "int": _check_int,
    "rank": _check_rank,
    "bool": _check_bool,
    "str": _check_str,
    "path": lambda spec, value: value if isinstance(value, str) and value else None,
}


# --- what a recipe says ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """`value` for the tensors whose name contains `filter`; None and "*": for all tensors."""

    value: Value
    filter: str | None = None

    def matches(self, tensor: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in tensor


@dataclass(frozen=True)
class Setting:
    """What a recipe gives for one parameter: conditions, of which the first that matches a tensor counts.

    A plain value is one condition without a filter, so it and `[{value: ...}]` are the same setting.
    """

    conditions: tuple[Condition, ...]

    @classmethod
    def parse(cls, raw: object, place: str) -> Setting:
        """From YAML data: a scalar, a list of scalars, `{filter, value}` or a list of these."""
        if isinstance(raw, dict):
            return cls((_parse_condition(raw, place),))
        if isinstance(raw, (list, tuple)) and any(isinstance(item, dict) for item in raw):
            return cls(tuple(_parse_condition(item, f"{place}[{index}]") for index, item in enumerate(raw)))
        return cls((Condition(_parse_value(raw, place)),))

    @property
    def plain(self) -> bool:
        return len(self.conditions) == 1 and self.conditions[0].filter is None

    def checked(self, spec: ParameterSpec, place: str) -> Setting:
        """The same setting with every value checked and converted by `spec`."""
        return Setting(
            tuple(
                Condition(_check_value(spec, c.value, place if self.plain else f"{place}[{i}].value"), c.filter)
                for i, c in enumerate(self.conditions)
            )
        )

    def mapped(self, change: Callable[[str], str]) -> Setting:
        """The same setting with every text changed."""

        def one(value: Value) -> Value:
            if isinstance(value, tuple):
                return tuple(change(item) if isinstance(item, str) else item for item in value)
            return change(value) if isinstance(value, str) else value

        return Setting(tuple(Condition(one(c.value), c.filter) for c in self.conditions))

    def evaluate(self, tensor: str, position: float) -> Scalar | None:
        """Value for a tensor at a depth in [0, 1]; None if no condition matches its name."""
        value = next((c.value for c in self.conditions if c.matches(tensor)), None)
        return _interpolate(value, position) if isinstance(value, tuple) else value

    def data(self) -> Any:
        """As YAML data, the inverse of `parse`."""
        items = [
            {"filter": c.filter, "value": list(c.value) if isinstance(c.value, tuple) else c.value}
            for c in self.conditions
        ]
        if self.plain:
            return items[0]["value"]
        return [item if item["filter"] is not None else {"value": item["value"]} for item in items]


def _parse_condition(raw: object, place: str) -> Condition:
    if not isinstance(raw, dict):
        raise SettingError(place, f"expected {{filter: ..., value: ...}} like the other items, got {shown(raw)}")
    for key in raw:
        if key not in ("filter", "value"):
            raise SettingError(f"{place}.{key}", f"unknown key {shown(key)}{nearest(key, ('filter', 'value'))}")
    if "value" not in raw:
        raise SettingError(f"{place}.value", "missing")
    pattern = raw.get("filter")
    if pattern is not None and not (isinstance(pattern, str) and pattern):
        raise SettingError(f"{place}.filter", f"expected a part of tensor names, got {shown(pattern)}")
    return Condition(_parse_value(raw["value"], f"{place}.value"), pattern)


def _parse_value(raw: object, place: str) -> Value:
    if isinstance(raw, (list, tuple)) and raw:
        return tuple(_parse_scalar(item, f"{place}[{index}]") for index, item in enumerate(raw))
    return _parse_scalar(raw, place)


def _parse_scalar(raw: object, place: str) -> Scalar:
    if isinstance(raw, (bool, str)):
        return raw
    if isinstance(raw, Integral):  # numpy's numbers are none of Python's
        return int(raw)
    if isinstance(raw, Real):
        return float(raw)
    raise SettingError(place, f"expected a number, true, false or a string, got {shown(raw)}")


def _check_value(spec: ParameterSpec, value: Value, place: str) -> Value:
    if not isinstance(value, tuple):
        return _check_scalar(spec, value, place)
    checked = tuple(_check_scalar(spec, item, f"{place}[{index}]") for index, item in enumerate(value))
    if spec.kind == "rank" and len({isinstance(item, float) for item in checked}) > 1:
        raise SettingError(place, f"expected either integers or fractions, got both: {shown(value)}")
    return checked


def _check_scalar(spec: ParameterSpec, value: Scalar, place: str) -> Scalar:
    try:
        return spec.check(value)
    except ValueError as error:
        raise SettingError(place, str(error)) from None


def _interpolate(values: tuple[Scalar, ...], position: float) -> Scalar:
    scaled = position * (len(values) - 1)
    first = int(scaled)
    if any(isinstance(value, (bool, str)) for value in values):
        return values[first]  # there is nothing between two words: the last point passed counts
    low, high = float(values[first]), float(values[min(first + 1, len(values) - 1)])
    value = (1 - (scaled - first)) * low + (scaled - first) * high
    return min(max(value, min(low, high)), max(low, high))  # round-off must not leave the range that was checked
