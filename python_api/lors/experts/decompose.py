"""Making expert files, and using them: decompose an expert, add it to a merged model or take it out, export its L.

    W_new = W_merged + lambda * weight * (L + S)        add;  remove subtracts

A merge sums the updates before it adds the base, and rounds once. A merged model no longer knows that sum, so every edit
rounds once more: an add or remove moves an entry by at most half a unit in the last place of the model's dtype from the
exact W +- update, plus 2^-24 of the update. Adding what was removed, or removing what was added, again and again goes to
and fro between the same two models.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

import lors_kernels
from lors_kernels import KEEP_NONE, FactorOverflowError, NonFiniteError

from ..checkpoints import layers
from ..checkpoints.compatibility import compare
from ..checkpoints.reader import Checkpoint, open_checkpoint, require_unchanged
from ..checkpoints.writer import WeightWriter
from ..errors import LorsError, SettingError
from ..files.directory import OutputDirectory
from ..files.file import OutputFile
from ..files.remote import is_url, placed
from ..files.replaceable import EXPERT_FILE
from ..public import public
from ..recipes.entries import Target
from ..recipes.parameters import LARGEST, rank_of
from .expert_source import (
    BLOCK,
    CHECKS,
    CHUNK,
    ENERGIES,
    EXPONENTS,
    KEY,
    VALUE_TYPES,
    ExpertSource,
    Layout,
    Part,
    checksums,
    encode_gaps,
    is_expert_file,
    seal,
)
from .source import FileSource, Slot, Source

__all__ = ["Decomposition", "decompose", "export_lora", "open_expert"]

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
        compare(origin, tuned)
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
        encoder = _Encoder(layout, FileSource(base), FileSource(tuned, list(base.tensors)), writer, backend)
        encoder.run(threads)
        encoder.finish(text)
        writer.finish()
    return math.sqrt(encoder.lost / encoder.energy) if encoder.energy else 0.0


class _Encoder:
    """Computes and writes every part; parts in any order, each by one thread."""

    def __init__(self, layout: Layout, base: Source, tuned: Source, writer: WeightWriter, backend: str | None) -> None:
        self._layout, self._base, self._tuned, self._writer, self._backend = layout, base, tuned, writer, backend
        stored = layout.stored
        self._checks = np.zeros(stored[CHECKS].shape, np.uint32)
        self._exponents = np.zeros(stored[EXPONENTS].shape, np.int16)
        self._energies = np.zeros(stored[ENERGIES].shape)
        self._row = {part.name: row for row, part in enumerate(p for p in layout.parts if p.matrix)}
        self._lock, self._local = threading.Lock(), threading.local()
        self._waiting: dict[str, np.ndarray] = {}
        self.lost, self.energy = 0.0, 0.0  # squared norms of what storing loses, and of the update

    def run(self, threads: int) -> None:
        tasks: list[Callable[[], None]] = []
        for part in self._layout.parts:
            if part.matrix:
                tasks.append(lambda part=part: self._matrix(part))  # type: ignore[misc]
            else:
                tasks += [lambda part=part, at=at: self._rest(part, at) for at in range(0, part.numel, CHUNK)]  # type: ignore[misc]
        with ThreadPoolExecutor(threads, thread_name_prefix="lors") as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def finish(self, text: str) -> None:
        """The tables at the end of the file."""
        self._put(ENERGIES, self._energies)
        self._put(EXPONENTS, self._exponents)
        self._checks[-1] = seal(self._checks[:-1], text)
        self._writer.write(CHECKS, self._checks)

    def _put(self, name: str, array: np.ndarray, start: int = 0) -> None:
        """Writes elements from `start`, the beginning of a chunk, on."""
        first = self._layout.stored[name].first + start // CHUNK
        found = checksums(array)
        self._checks[first : first + len(found)] = found
        self._writer.write(name, array, start)

    def _fetch(self, part: Part, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        if not hasattr(self._local, "slots"):
            self._local.slots = Slot(), Slot()
        base, tuned = self._local.slots
        return self._base.fetch(part.name, start, stop, base), self._tuned.fetch(part.name, start, stop, tuned)

    def _matrix(self, part: Part) -> None:
        base, tuned = (x.reshape(part.shape) for x in self._fetch(part, 0, part.numel))
        options: dict[str, Any] = {"backend": self._backend}
        left, right = None, None
        try:
            if part.rank:
                svd = lors_kernels.truncated_svd(base, tuned, part.rank, seed=self._layout.seed, threads=1, **options)
                left, right = svd.left, svd.right
            pair = (base, tuned, left, right)
            threshold = (
                lors_kernels.residual_threshold(*pair, part.kept, threads=1, **options) if part.kept else KEEP_NONE
            )
        except NonFiniteError as error:
            raise self._non_finite(part, error.count) from None
        except FactorOverflowError as error:
            raise LorsError(f"{self._tuned.name}: tensor {part.name!r}: {error}") from None
        out = np.zeros(part.shape, np.float32)
        stats = lors_kernels.merge_update(out, *pair, threshold, 1.0, threads=1, **options)
        if stats.non_finite:
            raise self._non_finite(part, stats.non_finite)
        lost = 0.0
        if left is not None and right is not None:
            self._put(f"{part.name}:left", np.ascontiguousarray(left))
            self._put(f"{part.name}:right", np.ascontiguousarray(right))
        if part.kept:
            sparse = lors_kernels.sparse_part(*pair, threshold, part.kept, **options)
            mask = sparse.mask
            if self._layout.index == "gaps":
                size = self._layout.stored[f"{part.name}:gaps"].shape[0]
                mask = encode_gaps(mask, part.numel, size)
            self._put(f"{part.name}:{self._layout.index}", mask)
            lost = self._floats(part, "values", sparse.values, self._layout.values)
        energies = stats.delta_energy, stats.residual_energy, stats.kept_energy
        if not np.isfinite(energies).all():
            raise LorsError(
                f"{self._tuned.name}: tensor {part.name!r}: the squares of its difference to the base overflow float32"
            )
        self._energies[self._row[part.name]] = energies
        self._count(lost, _square(out))

    def _rest(self, part: Part, start: int) -> None:
        base, tuned = self._fetch(part, start, min(start + CHUNK, part.numel))
        with np.errstate(over="ignore", invalid="ignore"):
            delta = tuned.astype(np.float32) - base.astype(np.float32)
        if bad := int(np.count_nonzero(~np.isfinite(delta))):
            raise self._non_finite(part, bad)
        if self._layout.remainder == "none":
            lost = _square(delta)
        elif self._layout.remainder == "int8":
            lost = self._int8(part, delta, start)
        else:
            lost = self._floats(part, "delta", delta, self._layout.remainder, start)
        self._count(lost, _square(delta))

    def _floats(self, part: Part, array: str, values: np.ndarray, kind: str, start: int = 0) -> float:
        """Writes float32 values as `kind` and returns the squared norm of what that loses."""
        name = f"{part.name}:{array}"
        exponent, stored = 0, values
        if kind == "float16":
            # The largest goes to [2^14, 2^15): deltas are small, and float16 has 11 bits only above 2^-14.
            largest = float(np.abs(values).max()) if values.size else 0.0
            exponent = max(-100, math.frexp(largest)[1] - 15) if largest else 0
            stored = (values * np.float32(2.0**-exponent)).astype(np.float16)
        elif kind == "bfloat16":
            stored = values.astype(VALUE_TYPES[kind])
        self._exponents[self._layout.stored[name].first + start // CHUNK] = exponent
        self._put(name, stored, start)
        if kind == "float32":
            return 0.0
        with np.errstate(over="ignore"):
            return self._loss(part, kind, stored.astype(np.float32) * np.float32(2.0**exponent), values)

    def _int8(self, part: Part, delta: np.ndarray, start: int) -> float:
        padded = np.zeros(-(-delta.size // BLOCK) * BLOCK, np.float32)
        padded[: delta.size] = delta
        blocks = padded.reshape(-1, BLOCK)
        scales = np.abs(blocks).max(axis=1) / np.float32(127)
        quantised = np.rint(blocks / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
        self._put(f"{part.name}:int8", quantised.reshape(-1)[: delta.size], start)
        self._scales(part, scales, start)
        with np.errstate(over="ignore"):
            return self._loss(part, "int8", quantised * scales[:, None], blocks)

    def _loss(self, part: Part, kind: str, restored: np.ndarray, values: np.ndarray) -> float:
        """The squared norm of what storing loses; LorsError where what is stored is infinite again."""
        with np.errstate(invalid="ignore"):
            lost = _square(restored - values)
        if not math.isfinite(lost):
            option = "values" if part.matrix else "remainder"
            raise LorsError(
                f"{self._tuned.name}: tensor {part.name!r}: its difference to the base reaches {np.abs(values).max():.6g}, "
                f"which rounds to infinity as {kind}; choose float32 as --{option}"
            )
        return lost

    def _scales(self, part: Part, scales: np.ndarray, start: int) -> None:
        """Scales of one chunk; the array as a whole is written when the last of them is there."""
        name = f"{part.name}:scales"
        with self._lock:
            waiting = self._waiting.setdefault(name, np.full(self._layout.stored[name].shape, np.nan, np.float32))
            waiting[start // BLOCK : start // BLOCK + scales.size] = scales
            complete = not np.isnan(waiting).any()
        if complete:
            self._put(name, waiting)

    def _count(self, lost: float, energy: float) -> None:
        with self._lock:
            self.lost += lost
            self.energy += energy

    def _non_finite(self, part: Part, count: int) -> LorsError:
        return LorsError(
            f"{self._tuned.name}: tensor {part.name!r}: expected a finite difference to the base, got {count} NaN or "
            "infinite entries"
        )


def _square(values: np.ndarray) -> float:
    """The sum of squares, in float64: of values that float32 holds it may not."""
    return float(np.square(values, dtype=np.float64).sum())


# --- using them ------------------------------------------------------------------------------------------------------


def open_expert(path: str | os.PathLike[str], name: str | None = None) -> ExpertSource:
    """An expert file, checked; close its `.checkpoint` after use. LorsError when it is a checkpoint or damaged."""
    checkpoint = open_checkpoint(os.fspath(path), name=name)
    try:
        if not is_expert_file(checkpoint):
            raise LorsError(f"{path}: expected an expert file, got a checkpoint; `lors decompose` makes one of it")
        source = ExpertSource(checkpoint)
        if name is None:
            source.name = checkpoint.name = source.layout.name
        return source
    except BaseException:
        checkpoint.close()
        raise


def export_lora(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    scale: float = 1.0,
    force: bool = False,
) -> int:
    """Writes L as a PEFT LoRA adapter: W + scale * L = W + (alpha / r) B @ A with B = left, A = right.T.

    base: what PEFT shall call the base model (the adapter's base_model_name_or_path). Returns the number of matrices.
    """
    if not abs(scale) <= LARGEST:
        raise SettingError("scale", f"expected a number that float32 can hold, got {scale:g}")
    source = open_expert(path)
    with source.checkpoint, OutputDirectory(out, force=force, inputs=[path]) as directory:
        matrices = [part for part in source.layout.parts if part.matrix and part.rank and part.name.endswith(".weight")]
        if not matrices:
            raise LorsError(f"{path}: there is no low-rank part in it")
        modules = {part.name.removesuffix(".weight"): part for part in matrices}
        specs = []
        for module, part in modules.items():
            specs.append((f"base_model.model.{module}.lora_A.weight", np.dtype(np.float32), (part.rank, part.shape[1])))
            specs.append((f"base_model.model.{module}.lora_B.weight", np.dtype(np.float32), (part.shape[0], part.rank)))
        with WeightWriter(directory.path, specs, stem="adapter_model", shard_bytes=2**63) as writer:
            for module, part in modules.items():
                left, right = source.stored_factors(part.name)
                writer.write(f"base_model.model.{module}.lora_A.weight", np.ascontiguousarray(right.T))
                writer.write(f"base_model.model.{module}.lora_B.weight", left)
            writer.finish()
        ranks = {module: part.rank for module, part in modules.items()}
        config = _adapter_config(ranks, None if base is None else public(base), scale)
        directory.write_text("adapter_config.json", json.dumps(config, indent=2) + "\n")
        directory.commit()
    return len(modules)


def _adapter_config(ranks: Mapping[str, int], base: str | None, scale: float) -> dict[str, Any]:
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    odd = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual * scale,
        "rank_pattern": odd,
        "alpha_pattern": {module: rank * scale for module, rank in odd.items()},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }
