"""Documents from outside: JSON as typed documents, of which every field is checked before anything is done with them.

A document declares its fields on `Document`; `read` (a file), `parse` (text) and `check` (parsed JSON) give one, or a
LorsError of one line such as ``PATH: experts[0].weight: expected a number, got 'x'``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import LorsError, nearest, shown
from . import strict_json

__all__ = ["Digest", "MAX_VALUES", "Document", "ModelConfig", "first_problem", "problem"]

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
MAX_VALUES = 100_000  # of a document: what is wrong with each takes pydantic up to 1.5 kB to say
T = TypeVar("T", bound="Document")


class Document(BaseModel):
    """Fields have the types they are declared with, nothing is converted, and there are no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)

    @classmethod
    def parse(cls: type[T], text: str | bytes, where: str) -> T:
        """The document in a JSON text; LorsError that begins with `where`."""
        strict_json.parse(text, where, values=MAX_VALUES)  # pydantic's parser takes keys twice, NaN, and more
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise LorsError(f"{where}: {problem(error, cls)}") from None

    @classmethod
    def check(cls: type[T], content: object, where: str) -> T:
        """The document that JSON of at most MAX_VALUES values is."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise LorsError(f"{where}: {problem(error, cls)}") from None

    @classmethod
    def read(cls: type[T], path: Path) -> T:
        """The document in a file."""
        return cls.parse(strict_json.read_bytes(path), str(path))


class ModelConfig(Document):
    """What lors itself reads of a model's config.json; the rest is transformers' concern."""

    model_config = ConfigDict(extra="ignore")

    model_type: str | None = None
    architectures: list[str] | None = None
    tie_word_embeddings: bool | None = None
    d_model: int | None = None
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    vocab_size: int | None = None
    num_mel_bins: int | None = None


# --- what is wrong, in one line --------------------------------------------------------------------------------------

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_EXPECTED = {
    "string_type": "a string", "string_unicode": "a string of whole characters", "string_too_short": "a string that is not empty",
    "too_short": "at least one", "tuple_type": "a list", "list_type": "a list", "dict_type": "an object",
    "model_type": "an object", "dataclass_type": "an object", "int_type": "an integer", "float_type": "a number",
    "finite_number": "a finite number", "bool_type": "true or false", "none_required": "null",
}  # fmt: skip


def problem(error: ValidationError, kind: type[BaseModel]) -> str:
    """Where and what is wrong with a document."""
    place, what = first_problem(error, {(): kind})
    return f"{place}: {what}" if place else what


def first_problem(
    error: ValidationError, known: Mapping[tuple[str, ...], type[BaseModel]], words: Mapping[str, str] = _EXPECTED
) -> tuple[str, str]:
    """(where, what): an unknown key before all else, for a misspelt key is also a missing one.

    known: place of a mapping, its names only, -> the model whose keys it may have. words: type of problem -> what was expected.
    """
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] in _UNKNOWN), problems[0])
    location, value, code = first["loc"], first["input"], first["type"]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    if code in _UNKNOWN:
        owner = known.get(tuple(part for part in location[:-1] if isinstance(part, str)))
        return place, f"unknown key {shown(location[-1])}{nearest(location[-1], owner.model_fields) if owner else ''}"
    if code == "missing":
        return place, "missing"
    if code == "value_error":
        return place, str(first["ctx"]["error"])
    if code == "literal_error":
        choices = re.split(", | or ", first["ctx"]["expected"])
        return (
            place,
            f"expected {'one of ' * (len(choices) > 1)}{', '.join(choices).replace(chr(39), '')}, got {shown(value)}",
        )
    if code == "string_pattern_mismatch":
        return place, f"expected text of the form {first['ctx']['pattern']}, got {shown(value)}"
    message = first["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return place, f"expected {words.get(code, message)}, got {shown(value)}"
