"""Whether an expert has the base's architecture, and if not, what differs, in the user's words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import LorsError
from .layers import HEAD, layer_of
from .tensor_info import TensorInfo

if TYPE_CHECKING:
    from .reader import Checkpoint

__all__ = ["ENGLISH_ONLY", "VOCABULARIES", "compare", "dtype_kind"]

_SIZES = {384: "tiny", 512: "base", 768: "small", 1024: "medium", 1280: "large"}
ENGLISH_ONLY = 51864  # tokens
VOCABULARIES = {ENGLISH_ONLY: "English-only", 51865: "multilingual, up to large-v2", 51866: "large-v3 and turbo"}
_FLOATS = {"F16", "BF16", "F32"}
_CONV1 = re.compile(r"(?:^|\.)encoder\.conv1\.weight$")
_TOKENS = re.compile(r"(?:^|\.)(embed_tokens|token_embedding|proj_out)\.weight$")


def dtype_kind(info: TensorInfo) -> str:
    """What can be done with a tensor.

    "float" can be merged, "integer" (bool included) is carried from the base, the others are refused: sums are made in
    float32, so that of float64 values would be lost, and those beyond float32 be infinite.
    """
    if info.code in _FLOATS:
        return "float"
    if info.dtype.kind in "iub":
        return "integer"
    if info.code == "F64":
        return "64-bit float"
    return "complex" if info.dtype.kind == "c" else "8-bit float"


def compare(
    base: Checkpoint, expert: Checkpoint, tables: frozenset[str] = frozenset(), *, advice: str | None = None
) -> None:
    """Raises LorsError, with the first reason that explains the most, unless `expert` can be merged into `base`.

    tables: may have another number of rows. advice: what a user can do about another vocabulary.

    Asked for are the same naming, tensor names and shapes, and floats where the base has floats. A stored output
    projection that equals the token embedding is no difference: read the expert under ``expert.resolve(name)``.
    """
    _compare_naming(base, expert)
    _compare_size(base, expert)
    for name, ours in base.tensors.items():
        stored = expert.resolve(name)
        if stored is None:
            continue
        skip, theirs = int(name in tables), expert.tensors[stored]
        if theirs.shape[skip:] != ours.shape[skip:] or len(theirs.shape) != len(ours.shape):
            raise LorsError(f"{expert.name}: {_shape_message(name, ours, theirs, base.name, advice)}")
    _compare_names(base, expert)
    _compare_dtypes(base, expert)


def _compare_naming(base: Checkpoint, expert: Checkpoint) -> None:
    if base.naming != expert.naming and "other" not in (base.naming, expert.naming):
        raise LorsError(
            f"{expert.name}: its tensors are named as in {expert.naming}, those of {base.name} as in {base.naming}; "
            f"convert one of them"
        )
    if not base.tensors.keys() & expert.tensors.keys():
        ours, theirs = next(iter(base.tensors), ""), next(iter(expert.tensors), "")
        bare = {f"model.{name}" for name in expert.tensors}
        hint = "; its names lack the prefix 'model.'" if bare & base.tensors.keys() else ""
        raise LorsError(
            f"{expert.name}: no tensor has the name of one in {base.name}: expected names like {ours!r}, "
            f"got {theirs!r}{hint}"
        )


def _compare_size(base: Checkpoint, expert: Checkpoint) -> None:
    ours, theirs = _width(base), _width(expert)
    if ours and theirs and ours != theirs:
        raise LorsError(
            f"{expert.name}: another model size: expected d_model {_named(ours, _SIZES)} as in {base.name}, "
            f"got {_named(theirs, _SIZES)}"
        )
    for part in ("encoder", "decoder"):
        ours, theirs = _depth(base, part), _depth(expert, part)
        if ours and theirs and ours != theirs:
            raise LorsError(
                f"{expert.name}: another depth: expected {ours} {part} layers as in {base.name}, got {theirs}"
            )


def _width(checkpoint: Checkpoint) -> int:
    """d_model, 0 when the names do not tell."""
    shapes = (info.shape for name, info in checkpoint.tensors.items() if _CONV1.search(name))
    return next((shape[0] for shape in shapes if len(shape) == 3), 0)


def _depth(checkpoint: Checkpoint, part: str) -> int:
    layers = filter(None, map(layer_of, checkpoint.tensors))
    return 1 + max((layer.number for layer in layers if layer.part == part), default=-1)


def _named(value: int, names: dict[int, str]) -> str:
    return f"{value} ({names[value]})" if value in names else str(value)


def _shape_message(name: str, ours: TensorInfo, theirs: TensorInfo, base: str, advice: str | None) -> str:
    if _TOKENS.search(name) and ours.shape[1:] == theirs.shape[1:]:
        return (
            f"another vocabulary: expected {_named(ours.shape[0], VOCABULARIES)} tokens as in {base}, "
            f"got {_named(theirs.shape[0], VOCABULARIES)} (tensor {name!r}){f'; {advice}' if advice else ''}"
        )
    if _CONV1.search(name) and len(ours.shape) == len(theirs.shape) == 3 and ours.shape[1] != theirs.shape[1]:
        return (
            f"another audio front end: expected {ours.shape[1]} mel bins as in {base}, got {theirs.shape[1]} "
            f"(large-v3 and turbo have 128, the others 80; tensor {name!r})"
        )
    return f"tensor {name!r}: expected shape {list(ours.shape)} as in {base}, got {list(theirs.shape)}"


def _compare_names(base: Checkpoint, expert: Checkpoint) -> None:
    missing = [name for name in base.tensors if expert.resolve(name) is None]
    extra = [name for name in expert.tensors if name not in base.tensors and not (name == HEAD and expert.head_is_tied)]
    if not missing and not extra:
        return
    problems = [f"{kind} {_listing(names)}" for kind, names in (("lacks", missing), ("has the extra", extra)) if names]
    hint = "; its output projection differs from its token embedding, which the base ties" if extra == [HEAD] else ""
    raise LorsError(f"{expert.name}: not the tensors of {base.name}: it {' and '.join(problems)}{hint}")


def _listing(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} tensor{'s'[: len(names) > 1]} {', '.join(map(repr, names[:shown]))}{more}"


def _compare_dtypes(base: Checkpoint, expert: Checkpoint) -> None:
    for name, ours in base.tensors.items():
        theirs = expert.tensors[str(expert.resolve(name))]
        for checkpoint, info in ((base, ours), (expert, theirs)):
            if dtype_kind(info) not in ("float", "integer"):
                raise LorsError(
                    f"{checkpoint.name}: tensor {info.name!r}: {info.code} cannot be merged: expected F32, F16 or BF16"
                )
        if dtype_kind(ours) != dtype_kind(theirs):
            raise LorsError(
                f"{expert.name}: tensor {name!r}: expected {ours.code} ({dtype_kind(ours)}) as in {base.name}, "
                f"got {theirs.code} ({dtype_kind(theirs)})"
            )
