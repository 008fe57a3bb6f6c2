"""Short unique labels for the models of a recipe."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from ..errors import SettingError, shown
from ..public import public
from .entries import ModelEntry

_WEIGHTS_FILE = re.compile(r"\.(safetensors|pt|pth|bin)$")
_SAYS_NOTHING = ("model", "pytorch_model", "adapter_model")


def labels_of(entries: Sequence[ModelEntry]) -> tuple[str, ...]:
    """Given names; else the last part of the path, lengthened to the left while two are equal."""
    parts = [path_parts(entry.model) for entry in entries]
    labels = [entry.name or part[-1] for entry, part in zip(entries, parts, strict=True)]
    derived = [i for i, entry in enumerate(entries) if entry.name is None]
    for depth in range(2, max(map(len, parts)) + 1):
        times = Counter(labels)
        for i in [i for i in derived if times[labels[i]] > 1]:
            labels[i] = "-".join(parts[i][-depth:])
    taken = {entry.name for entry in entries}
    for i in derived:
        label, number = labels[i], 2
        while labels[i] in taken:  # the very same path twice
            labels[i], number = f"{label}-{number}", number + 1
        taken.add(labels[i])
    return tuple(labels)


def path_parts(model: str) -> list[str]:
    model = public(model).partition("://")[2] if "://" in model else model.split("@")[0]
    parts = [part for part in model.split("/") if part not in ("", ".", "..", "~")] or ["model"]
    stem = _WEIGHTS_FILE.sub("", parts[-1])
    if stem != parts[-1] and stem in _SAYS_NOTHING and len(parts) > 1:
        return parts[:-1]  # .../ca/model.safetensors is ca
    return [*parts[:-1], stem]


def check_labels(entries: Sequence[ModelEntry]) -> None:
    first: dict[str, int] = {}
    for index, entry in enumerate(entries):
        if entry.name is not None and first.setdefault(entry.name, index) != index:
            other = f"models[{first[entry.name]}]"
            raise SettingError(f"models[{index}].name", f"{shown(entry.name)} is already the name of {other}")
