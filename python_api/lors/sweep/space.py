"""The settings of a sweep: what `--rank 1,2,4 --density 0.05:0.5:0.05 --lambda 0.1:1` mean.

1,2,4          these values
0.05:0.5:0.05  from, to (included), step
0.1:1          any value between, for the samplers that draw (random, tpe)
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SettingError
from ..recipes.parameters import ParameterSpec

__all__ = ["Axis", "Space"]

MAX_VALUES = 10_000


@dataclass(frozen=True)
class Axis:
    """Values of one parameter: a list, or an interval to draw from."""

    name: str
    values: tuple[Any, ...] = ()
    interval: tuple[float, float] | None = None

    @classmethod
    def parse(cls, spec: ParameterSpec, text: str) -> Axis:
        """SettingError says what is wrong with the values."""
        try:
            if ":" not in text:
                return cls(spec.name, _distinct(spec.check(_number(item)) for item in text.split(",")))
            low, high, *step = _bounds(text)
            if len(step) > 1 or not low <= high:
                raise ValueError("expected FROM:TO or FROM:TO:STEP with FROM <= TO")
            if not step:
                return cls(spec.name, interval=(float(spec.check(low)), float(spec.check(high))))
            if not step[0] > 0:
                raise ValueError(f"expected a step above 0, got {step[0]:g}")
            count = int((high - low) / step[0] + 1e-9) + 1
            if count > MAX_VALUES:
                raise ValueError(f"expected at most {MAX_VALUES} values, got {count}")
            # rounded, so that 0.05 + 2 * 0.05 is 0.15 in the recipe and in the tables
            return cls(spec.name, _distinct(spec.check(round(low + i * step[0], 10)) for i in range(count)))
        except ValueError as error:
            raise SettingError(spec.name, f"{text}: {error}") from None

    def draw(self, generator: random.Random) -> Any:
        return generator.choice(self.values) if self.interval is None else generator.uniform(*self.interval)


def _bounds(text: str) -> list[float]:
    try:
        return [float(item) for item in text.split(":")]
    except ValueError:
        raise ValueError("expected numbers as FROM:TO or FROM:TO:STEP") from None


def _number(text: str) -> Any:
    text = text.strip()
    try:
        return float(text) if text.lower() not in ("true", "false") else text.lower() == "true"
    except ValueError:
        return text


def _distinct(values: Iterator[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


@dataclass(frozen=True)
class Space:
    """The axes that one method has."""

    method: str
    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, method: str, specs: Mapping[str, ParameterSpec], options: Mapping[str, str]) -> Space:
        """Options of parameters that the method has not are left out: methods are compared on what they have."""
        return cls(method, tuple(Axis.parse(specs[name], text) for name, text in options.items() if name in specs))

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every setting; the last axis changes fastest, and lambda is put last, where changing it costs least."""
        if open_ended := [axis.name for axis in self.axes if axis.interval]:
            raise SettingError(open_ended[0], "a grid needs a step: FROM:TO:STEP, or --sampler random or tpe")
        axes = sorted(self.axes, key=lambda axis: axis.name == "lambda")
        for values in itertools.product(*(axis.values for axis in axes)):
            yield {axis.name: value for axis, value in zip(axes, values, strict=True)}

    def random(self, seed: int) -> Iterator[dict[str, Any]]:
        """Settings without end, the same for the same seed."""
        generator = random.Random(f"{seed}-{self.method}")
        while True:
            yield {axis.name: axis.draw(generator) for axis in self.axes}

    def largest(self, name: str) -> float | None:
        """The largest value of an axis; for ranks the fractions and the integers are not comparable, see `sweep`."""
        axis = next((axis for axis in self.axes if axis.name == name), None)
        if axis is None:
            return None
        return axis.interval[1] if axis.interval else max(axis.values)
