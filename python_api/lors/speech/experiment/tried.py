"""What was tried on dev, what was chosen of it, and whether a choice lies at the edge of what was tried."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...methods import SPECS
from ..model.whisper import resolve_model
from .config import Config, Setting

__all__ = ["at_edge", "spread", "tried"]


def tried(config: Config, label: str, stages: Mapping[str, Path]) -> dict[str, Any]:
    """Every setting with its values over the seeds, and each seed's choice; where a search had two rounds, the values of the
    first, the choice and the finalists with those of the second."""
    searches = [json.loads((stages[f"dev-{label}-s{seed}"] / "grid.json").read_text("utf-8")) for seed in config.seeds]
    by = config.criterion
    records = [
        {"setting": same[0]["setting"], **spread([record[by] for record in same])}
        for same in zip(*(search["grid"] for search in searches), strict=True)
    ]
    settings = [record["setting"] for record in records]
    method, width = config.grids[label].method, _width(config.base)
    chosen = [
        {
            "seed": seed,
            "setting": best["setting"],
            by: best[by],
            "edges": at_edge(best["setting"], settings, method, width),
        }
        for seed, best in zip(config.seeds, (search["best"] for search in searches), strict=True)
    ]
    finalists = [
        {"seed": seed, "setting": record["setting"], by: record[by]}
        for seed, search in zip(config.seeds, searches, strict=True)
        for record in search.get("finalists", [])
    ]
    return {
        "tried": records,
        "chosen": chosen,
        **({"finalists": finalists} if finalists else {}),
        "rest": [{"setting": r["setting"], by: r[by]} for r in searches[0]["rest"]],
    }


def _width(base: str) -> int | None:
    """Of a Whisper, which is the smaller side of all its matrices; None for one that is not here."""
    path = Path(resolve_model(base)) / "config.json"
    return int(json.loads(path.read_text("utf-8"))["d_model"]) if path.is_file() else None


def at_edge(chosen: Setting, settings: Sequence[Setting], method: str, width: int | None = None) -> list[str]:
    """Parameters whose chosen number is the least or the greatest that was tried, so that a better one may lie beyond.

    Not those of which one value was tried, nor a number that is the limit of what the method takes; the greatest rank is the
    `width` of the model.
    """
    spec = SPECS.get(method)
    found = []
    for name, value in chosen.items():
        values = [setting[name] for setting in settings]
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values) or len(set(values)) == 1:
            continue
        known = spec.parameter("lambda" if name == "lam" else name) if spec else None
        limits: tuple[Any, Any] = (known.minimum, known.maximum) if known else (None, None)
        if known is not None and known.kind == "rank":
            limits = (1, width)
        if value in (min(values), max(values)) and value not in limits:
            found.append(name)
    return found


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": sum(values) / len(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": values,
    }
