"""Making expert files: L + S of every decomposed matrix of an expert, delta of everything else."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

import lors_kernels

from ..checkpoints import layers
from ..checkpoints.compatibility import compare
from ..checkpoints.reader import Checkpoint, open_checkpoint, require_unchanged
from ..checkpoints.writer import WeightWriter
from ..errors import LorsError, SettingError
from ..files.file import OutputFile
from ..files.remote import is_url, placed
from ..files.replaceable import EXPERT_FILE
from ..public import public
from ..recipes.entries import Target
from ..recipes.parameters import rank_of
from .encoder import Encoder
from .expert_file import (
    KEY,
    Layout,
    Part,
    is_expert_file,
)
from .source import FileSource

__all__ = ["Decomposition", "decompose"]

MASK_DENSITY = 1 / 8  # from here on a bit per entry is smaller than a byte per kept entry


@dataclass
class Decomposition:
    """What `decompose` wrote. `error`: ||stored - exact|| / ||exact|| of the update, measured while writing."""

    path: str
    bytes: int
    checkpoint_bytes: int
    matrices: int
    error: float
    seconds: float = 0.0

    @property
    def share(self) -> float:
        """Size of the file over that of the checkpoint."""
        return self.bytes / self.checkpoint_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"share": self.share}


def decompose(
    base: str | os.PathLike[str],
    expert: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: float = 7,
    density: float = 0.2,
    values: str = "float16",
    index: str = "auto",
    remainder: str = "float16",
    target: Mapping[str, Any] | None = None,
    name: str | None = None,
    seed: int = 0,
    backend: str | None = None,
    threads: int | None = None,
    force: bool = False,
) -> Decomposition:
    """L + S of every decomposed matrix and delta of everything else, of delta = expert - base, in one file.

    Args:
        rank, density: as in a recipe; merges from the file may ask for less of both.
        values: type of S's values: float32, float16 or bfloat16. float16 is scaled per matrix by a power of two.
        index: how their places are stored: "mask" (a bit per entry), "gaps" (a byte per kept entry) or "auto".
        remainder: type of the other tensors' delta: float32, float16, int8 or none.
        target: which matrices are decomposed, as in a recipe.

    Raises LorsError; then `out` is as it was before.
    """
    begun = time.perf_counter()
    chosen = Target.model_validate(dict(target)) if target else None
    _check_options(rank, density, seed, values, index, remainder)
    with contextlib.ExitStack() as stack:
        path = Path(
            os.path.abspath(
                os.path.expanduser(stack.enter_context(placed(out, force, inputs=[base, expert], kind=EXPERT_FILE)))
            )
        )
        origin = stack.enter_context(open_checkpoint(os.fspath(base), name="base"))
        tuned = stack.enter_context(open_checkpoint(os.fspath(expert), name=name))
        for checkpoint in (origin, tuned):
            if is_expert_file(checkpoint):
                raise LorsError(f"{checkpoint.path}: expected a checkpoint, it is an expert file already")
        advice = "an expert file holds no tokens: merge the checkpoint with --vocabulary union"
        compare(origin, tuned, advice=advice)
        parts = _parts(origin, chosen, rank, density)
        kind = index if index != "auto" else "gaps" if density < MASK_DENSITY else "mask"
        count = lors_kernels.thread_count(threads)
        layout = Layout(
            name or tuned.name, origin.sha256(), tuned.sha256(), tuned.hub_id or tuned.path.resolve().name, rank, density, seed,
            cast(Any, values), cast(Any, kind), cast(Any, remainder), parts,
        )  # fmt: skip
        output = stack.enter_context(OutputFile(path, EXPERT_FILE, force=force, inputs=[*origin.files, *tuned.files]))
        error = _write(output.path, layout, origin, tuned, backend, count)
        require_unchanged((origin, tuned))
        output.commit()
        size, stored = sum(info.nbytes for info in tuned.tensors.values()), path.stat().st_size
    matrices = sum(part.matrix for part in parts)
    shown = public(out) if isinstance(out, str) and is_url(out) else str(path)
    return Decomposition(shown, stored, size, matrices, error, time.perf_counter() - begun)


def _check_options(rank: float, density: float, seed: int, values: str, index: str, remainder: str) -> None:
    if not 0 <= density <= 1:
        raise SettingError("density", f"expected a number in [0, 1], got {density}")
    if not 0 <= rank < math.inf or (rank >= 1 and rank != int(rank)):
        raise SettingError("rank", f"expected 0, an integer >= 1 or a fraction of min(m, n) below 1, got {rank}")
    if not 0 <= seed < 2**63:
        raise SettingError("seed", f"expected an integer in [0, 2**63), got {seed}")
    for option, value, known in (
        ("values", values, ("float32", "float16", "bfloat16")),
        ("index", index, ("auto", "mask", "gaps")),
        ("remainder", remainder, ("float32", "float16", "int8", "none")),
    ):
        if value not in known:
            raise SettingError(option, f"expected one of {', '.join(known)}, got {value!r}")


def _parts(base: Checkpoint, target: Target | None, rank: float, density: float) -> list[Part]:
    matrices = layers.select(base.tensors, base.naming, base.config, target).names
    parts = []
    for name, spec in FileSource(base).tensors.items():
        if not spec.floating:
            if np.dtype(spec.dtype).kind not in "iub":
                raise LorsError(
                    f"{base.name}: tensor {name!r}: expected float32, float16 or bfloat16, got {spec.dtype}"
                )
        elif name in matrices:
            try:
                asked = rank_of(rank, *spec.shape) if rank else 0
            except ValueError as error:
                problem = str(error).removeprefix("rank: ")
                raise SettingError("rank", f"{problem}: tensor {name!r}") from None
            parts.append(Part(name, spec.shape, asked, int(density * spec.numel)))
        else:
            parts.append(Part(name, spec.shape))
    return parts


def _write(path: Path, layout: Layout, base: Checkpoint, tuned: Checkpoint, backend: str | None, threads: int) -> float:
    text = layout.to_json()
    Layout.from_json(text, f"{tuned.name}: the metadata of its expert file")  # what is written can be read
    with WeightWriter(
        path.parent, layout.specs(), metadata={KEY: text}, shard_bytes=2**63, stem=path.stem, early_writeback=False
    ) as writer:
        encoder = Encoder(layout, FileSource(base), FileSource(tuned, list(base.tensors)), writer, backend)
        encoder.run(threads)
        encoder.finish(text)
        writer.finish()
    return math.sqrt(encoder.lost / encoder.energy) if encoder.energy else 0.0
