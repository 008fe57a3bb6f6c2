"""One module per backend, each with the operations under their public names."""

from __future__ import annotations

from pathlib import Path


def built(stem: str) -> list[str]:
    """File names of the compiled modules of this package that begin with `stem`, loadable here or not."""
    return sorted(path.name for path in Path(__file__).parent.parent.glob(f"{stem}*.so"))
