"""State dicts for engines on devices."""

from __future__ import annotations

from typing import Any

import lors


def merge(base: Any, experts: Any, **options: Any) -> dict[str, Any]:
    settings = {"rank": 3, "density": 0.25, "lam": 0.5, **options}
    settings = {name: value for name, value in settings.items() if value is not None or name == "backend"}
    merged: dict[str, Any] = lors.merge_state_dicts(base, experts, **settings)
    return merged
