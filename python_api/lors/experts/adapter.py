"""PEFT LoRA adapters as experts: W_t = W0 + scale * B_t @ A_t, read as factors and never stored as a matrix.

    scale = alpha / r, or alpha / sqrt(r) with use_rslora

What an adapter directory holds is checked against the base by name and shape before anything is merged; kinds of
adapters whose delta is not B @ A (DoRA and others) are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import ConfigDict, Field

from ..checkpoints.compatibility import dtype_kind
from ..checkpoints.reader import Checkpoint
from ..errors import LorsError, shown
from ..files.documents import Document
from .factors import Factors
from .source import Slot, Source, Spec, matrix_shape

T = TypeVar("T")

PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.weight)?")
# What a key of rank_pattern or alpha_pattern may be: a module's path or the end of it, with its dots escaped or not.
_MODULE = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")

# settings under which delta is not scale * B @ A of the named module
REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "a LoRA with biases of its own (lora_bias)",
    "layer_replication": "an adapter with replicated layers (layer_replication)",
    "target_parameters": "an adapter of bare parameters (target_parameters)",
    "trainable_token_indices": "an adapter with trained tokens (trainable_token_indices)",
    "alora_invocation_tokens": "an activated LoRA (alora_invocation_tokens)",
}


class AdapterConfig(Document):
    """What is read of adapter_config.json; of the other keys those in REFUSED must not be set."""

    model_config = ConfigDict(extra="ignore")

    base_model_name_or_path: str | None = None
    r: Annotated[int, Field(ge=1)] | None = None
    lora_alpha: float = 8
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


class AdapterSource:
    """The base with an adapter applied. LorsError unless the adapter fits the base."""

    parts = None

    def __init__(self, checkpoint: Checkpoint, base: Source) -> None:
        self.name, self._checkpoint, self._base = checkpoint.name, checkpoint, base
        content = checkpoint.adapter or {}
        _check_kind(self.name, content)
        where = f"{self.name}: adapter_config.json"
        self._config = AdapterConfig.check(content, where)
        self._ranks = _by_module(self._config.rank_pattern, f"{where}: rank_pattern")
        self._alphas = _by_module(self._config.alpha_pattern, f"{where}: alpha_pattern")
        self._factors: dict[str, Factors] = {}
        self._whole: dict[str, str] = {}  # tensors that the adapter replaces (modules_to_save, biases)
        self._read(checkpoint.tensors)
        self.tensors: dict[str, Spec] = {name: self._spec(name) for name in base.tensors}

    def fetch(self, name: str, start: int, stop: int, slot: Slot) -> np.ndarray:
        """Base + delta, in float32 where there is a delta."""
        if name in self._whole:
            out = slot.array(stop - start, self.tensors[name].dtype)
            return self._checkpoint.read(self._whole[name], out, start, stop)
        values = self._base.fetch(name, start, stop, slot)
        if name not in self._factors:
            return values
        return values.astype(np.float32) + self._factors[name].flat(start, stop)  # type: ignore[no-any-return]

    def prefetch(self, name: str) -> None:
        self._base.prefetch(name)

    def factors(self, name: str) -> Factors | None:
        """delta as factors, of rank 0 where the adapter changes nothing; None where it replaces the tensor."""
        if name in self._whole:
            return None
        rows, columns = matrix_shape(self.tensors[name].shape)
        return self._factors.get(name) or Factors(np.zeros((rows, 0), np.float32), np.zeros((columns, 0), np.float32))

    def _spec(self, name: str) -> Spec:
        if name in self._whole:
            info = self._checkpoint.info(self._whole[name])
            return Spec(info.dtype, info.shape)
        spec = self._base.tensors[name]
        return Spec(np.dtype(np.float32), spec.shape) if name in self._factors else spec

    # --- reading

    def _read(self, stored: Iterable[str]) -> None:
        parts: dict[str, dict[str, str]] = {}
        for key in stored:
            match = _PART.fullmatch(key.removeprefix(PREFIX))
            if match:
                parts.setdefault(match["module"], {})[match["part"]] = key
            elif "lora_" in key:
                raise LorsError(f"{self.name}: tensor {key!r}: expected lora_A and lora_B, no other part of an adapter")
            elif ".base_layer." in key:
                self._same_as_base(key)
            else:
                self._replace(key)
        if not parts:
            raise LorsError(f"{self.name}: expected a LoRA adapter, got no lora_A and lora_B in it")
        for module, keys in parts.items():
            self._add(module, keys)

    def _replace(self, key: str) -> None:
        name = self._target(key.removeprefix(PREFIX), key)
        info, expected = self._checkpoint.info(key), self._base.tensors[name]
        if info.shape != expected.shape:
            raise self._other_base(key, f"shape {list(expected.shape)}", f"{list(info.shape)}")
        if Spec(info.dtype, info.shape).floating != expected.floating:
            raise self._other_base(key, f"{expected.dtype}", info.code)
        self._whole[name] = key

    def _same_as_base(self, key: str) -> None:
        """PEFT stores the base's embedding beside an adapter of it; another one would be another base."""
        name = self._target(key.removeprefix(PREFIX).replace(".base_layer.", "."), key)
        spec = self._base.tensors[name]
        theirs = self._floats(key, spec.shape)
        ours = self._base.fetch(name, 0, spec.numel, Slot()).reshape(spec.shape)
        if (theirs != ours.astype(np.float32)).any():
            raise self._other_base(key, "the base's values", "others")

    def _add(self, module: str, keys: Mapping[str, str]) -> None:
        embedding = "lora_embedding_A" in keys or "lora_embedding_B" in keys
        wanted = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if set(keys) != set(wanted):
            raise LorsError(f"{self.name}: module {module!r}: expected {' and '.join(wanted)}, got {', '.join(keys)}")
        name = self._target(f"{module}.weight", keys[wanted[0]])
        a, b = (self._floats(keys[part]) for part in wanted)
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)  # convolutions: A [r, in, k..], B [out, r, 1..]
        shape = self._base.tensors[name].shape
        if a.shape[0] != b.shape[1]:
            raise LorsError(
                f"{self.name}: module {module!r}: expected one rank, got {a.shape[0]} in A and {b.shape[1]} in B"
            )
        self._check_rank(module, a.shape[0])
        with np.errstate(over="ignore"):  # looked at below
            left, right = b * np.float32(self._scale(module, a.shape[0])), a.T
        if embedding or self._config.fan_in_fan_out:
            left, right = right, left
        expected = (shape[0], int(np.prod(shape[1:], dtype=np.int64))) if len(shape) > 1 else shape
        if (len(left), len(right)) != expected:
            raise self._other_base(name, f"a delta {list(expected)}", f"{[len(left), len(right)]}")
        if not np.isfinite(left).all():
            raise LorsError(f"{self.name}: module {module!r}: its values times alpha / rank overflow")
        self._factors[name] = Factors(np.ascontiguousarray(left), np.ascontiguousarray(right))

    def _floats(self, key: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """A tensor of the adapter in float32: a matrix or more, or of `shape`; LorsError for anything that is no number."""
        info = self._checkpoint.info(key)
        if dtype_kind(info) != "float" or (shape is None and (len(info.shape) < 2 or not info.numel)):
            got = f"{info.code} {list(info.shape)}"
            raise LorsError(f"{self.name}: tensor {key!r}: expected a matrix of F32, F16 or BF16, got {got}")
        if shape is not None and info.shape != shape:
            raise self._other_base(key, f"shape {list(shape)}", f"{list(info.shape)}")
        values = self._checkpoint.read(key).astype(np.float32)
        if not np.isfinite(values).all():
            raise LorsError(f"{self.name}: tensor {key!r}: expected finite values, got NaN or infinite ones")
        return values

    def _target(self, name: str, key: str) -> str:
        """The base's name of a tensor; adapters of a model without its head lack the head's prefix."""
        for candidate in (name, f"model.{name}"):
            if candidate in self._factors or candidate in self._whole:
                raise LorsError(
                    f"{self.name}: tensor {key!r}: {candidate!r} is changed by another part of the adapter too"
                )
            if candidate in self._base.tensors:
                return candidate
        raise self._other_base(key, f"a tensor {name!r} in the base", "none")

    def _check_rank(self, module: str, rank: int) -> None:
        expected = _of_module(self._ranks, module, self._config.r)
        if expected is not None and rank != expected:
            raise LorsError(
                f"{self.name}: module {module!r}: expected rank {expected} by its configuration, got {rank}"
            )

    def _scale(self, module: str, rank: int) -> float:
        alpha = _of_module(self._alphas, module, self._config.lora_alpha)
        return alpha / (math.sqrt(rank) if self._config.use_rslora else rank)

    def _other_base(self, what: str, expected: str, got: str) -> LorsError:
        made_for = self._config.base_model_name_or_path
        return LorsError(
            f"{self.name}: an adapter of another base (of {made_for}): tensor {what!r}: expected {expected}, got {got}"
        )


def _check_kind(name: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LorsError(
            f"{name}: expected a LoRA adapter, got peft_type {kind if isinstance(kind, str) else shown(kind)}"
        )
    for key, meaning in REFUSED.items():
        if config.get(key):
            raise LorsError(f"{name}: {meaning} is not supported: merge it into its base first")


def _by_module(patterns: Mapping[str, T] | None, where: str) -> dict[str, tuple[int, T]]:
    """Each pattern's path, "^" before a whole one, with its place and value; LorsError for more than a module's path.

    PEFT takes regular expressions. One out of a file may take longer to match than anybody waits, so here a pattern is a
    path or the end of one, which is what PEFT and its tools write; a dot, escaped or not, is a dot.
    """
    found: dict[str, tuple[int, T]] = {}
    for place, (pattern, value) in enumerate((patterns or {}).items()):
        if not _MODULE.fullmatch(pattern):
            raise LorsError(
                f"{where}: expected the path of a module or the end of it, got {shown(pattern)}: merge the adapter into its "
                "base first"
            )
        found.setdefault(pattern.removesuffix("$").replace("\\.", "."), (place, value))
    return found


def _of_module(patterns: Mapping[str, tuple[int, T]], module: str, default: T) -> T:
    """The value of the first pattern that names the module, as in PEFT."""
    parts = module.split(".")
    ends = ["^" + module, *(".".join(parts[i:]) for i in range(len(parts)))]
    return min((patterns[end] for end in ends if end in patterns), key=lambda item: item[0], default=(0, default))[1]
