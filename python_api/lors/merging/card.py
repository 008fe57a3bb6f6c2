"""The model card (README.md) and the recipe file of a merged model: what it is made of, and how to make it again."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from ..checkpoints.layers import HF_WHISPER, OPENAI_WHISPER
from ..checkpoints.reader import Checkpoint
from ..errors import LorsError, printable, shown
from ..files.directory import RECIPE_FILE
from ..files.documents import Digest, Document
from ..files.writing import writing
from ..recipes import strict_yaml

__all__ = ["Input", "carried_over", "code", "is_untouched", "languages", "versions", "write_card"]

# The languages Whisper was trained on, as its tokenizer writes them.
_WHISPER_LANGUAGES = (
    "en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th ur hr bg lt la mi ml "
    "cy sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr pa si km sn yo so af oc ka be tg sd gu am "
    "yi lo uz fo ht ps tk nn mt sa lb my bo tl mg as tt haw ln ha ba jw su yue"
)
_MARK = "\n<!-- written by lors; sha256 of all above: "
_MAX_FRONT_MATTER = 64 << 10  # bytes
_PAPER = "*Low-Rank and Sparse Model Merging for Multi-Lingual Speech Recognition and Translation* (arXiv 2502.17380)"


@dataclass(frozen=True)
class Input:
    """One input of a merge, as its card names it.

    A local path is named by its last part only: a card is published, and directories of somebody's machine say nothing.
    """

    name: str
    origin: str  # hub id, or the name of the directory or file
    sha256: Annotated[Mapping[str, Digest], Field(min_length=1)]  # by weight file
    hub_id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$", max_length=200)] | None = None
    weight: float | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, sha256: Mapping[str, str], weight: float | None = None) -> Input:
        """The source that an opened checkpoint is."""
        origin = checkpoint.hub_id or checkpoint.path.resolve().name
        return cls(checkpoint.name, origin, sha256, checkpoint.hub_id, weight)


def write_card(
    directory: Path,
    *,
    base: Input,
    experts: Sequence[Input],
    method: str,
    parameters: Mapping[str, object],
    recipe: str,
    backend: str,
    naming: str = "hf-whisper",
    carried: Mapping[str, Any] | None = None,
    spoken: Sequence[str] = (),
) -> list[Path]:
    """Writes README.md and lors_recipe.yml into `directory` and returns their paths.

    Args:
        parameters: what the method ran with (rank, density, lambda ...), shown as given.
        recipe: the recipe as YAML text, written to the recipe file as it is.
        naming: of the merged checkpoint; only Whisper models are tagged as speech recognisers.
        spoken: codes of languages that the model has tokens for, besides those that Whisper was trained on.
        carried: what `carried_over` found in the base's card; its languages count if the experts' names tell none.

    Raises LorsError when the files cannot be written.
    """
    header = _header(base, experts, naming, carried or {}, spoken)
    text = _render(header, base, experts, method, parameters, recipe, backend, naming)
    written = [directory / "README.md", directory / RECIPE_FILE]
    for path, content in zip(written, (text + _seal(text), _ended(recipe)), strict=True):
        with writing(path):
            path.write_text(content, encoding="utf-8")
    return written


def is_untouched(card: Path) -> bool:
    """Whether a model card is as `write_card` wrote it: nobody's words are in it."""
    text, mark, end = card.read_text(encoding="utf-8", errors="replace").rpartition(_MARK)
    return bool(mark) and _seal(text) == mark + end


def _seal(text: str) -> str:
    return f"{_MARK}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def languages(names: Iterable[str], spoken: Iterable[str] = ()) -> list[str]:
    """The languages that experts are named after, in their order: ["ca", "sv-SE", "expert-de", "mix"] -> ["ca", "sv", "de"].

    Whisper's, and those `spoken` besides. A name begins or ends with the code.
    """
    known = {*_WHISPER_LANGUAGES.split(), *spoken}
    found = (next((code for code in (parts[0], parts[-1]) if code in known), None) for parts in map(_parts, names))
    return list(dict.fromkeys(code for code in found if code is not None))


def _parts(name: str) -> list[str]:
    return re.split(r"[-_]", name.lower())


def versions() -> dict[str, str]:
    """Versions of what a merge depends on."""
    found = {"python": platform.python_version()}
    for package in ("lors-merging", "numpy", "ml_dtypes"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a source tree
            found[package] = "not installed"
    return found


def carried_over(card: Path | None) -> tuple[dict[str, Any], list[str]]:
    """License and languages of a model card's YAML header, and a line for everything of them that cannot be used.

    The header is the base's author's: it may be anything. Only the lines of these few keys are parsed, each key for
    itself, so that a mistake elsewhere costs nothing.
    """
    if card is None:
        return {}, []
    try:
        lines = _header_lines(card)
    except LorsError as error:
        return {}, [f"{error}; no license is carried over"]
    keys, key = [], ""  # of each line: whose value it is
    for line in lines:
        if line[:1] not in ("", " ", "\t", "-", "#", "]", "}"):
            key = line.partition(":")[0].strip(" \"'")
        keys.append(key)
    found: dict[str, Any] = {}
    notices = []
    for key in sorted(set(keys) & set(_CARRIED)):
        try:
            text = "\n".join(line if of == key else "" for line, of in zip(lines, keys, strict=True))
            content = strict_yaml.parse("\n" + text, str(card))  # the first line is "---"
            found |= _Carried.check(content, str(card)).model_dump(exclude_none=True)
        except LorsError as error:
            notices.append(f"{error}; the {key} is not carried over")
    return found, notices


def _header_lines(card: Path) -> list[str]:
    """The lines between the first two "---"; none when the card does not begin with one."""
    try:
        with card.open("rb") as stream:
            text = stream.read(_MAX_FRONT_MATTER).decode("utf-8", "replace")
    except OSError as error:
        raise LorsError(f"cannot read {card}: {error.strerror or error}") from None
    first, *lines = (line.rstrip("\r") for line in text.removeprefix("\ufeff").split("\n"))
    if first.rstrip() != "---":
        return []
    end = next((number for number, line in enumerate(lines) if line.rstrip() == "---"), None)
    if end is None:
        raise LorsError(f"{card}: its header does not end within {_MAX_FRONT_MATTER} bytes")
    return lines[:end]


def _one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError(f"expected one line of text, got {shown(value)}")
    return value


_Words = Annotated[str, Field(min_length=1, max_length=300), AfterValidator(_one_line)]


class _Carried(Document):
    """What a card's header may say of these keys."""

    license: _Words | None = None
    license_name: _Words | None = None
    license_link: _Words | None = None
    language: _Words | Annotated[list[_Words], Field(max_length=200)] | None = None


_WHISPERS = (HF_WHISPER, OPENAI_WHISPER)
_CARRIED = tuple(_Carried.model_fields)


def _header(
    base: Input, experts: Sequence[Input], naming: str, carried: Mapping[str, Any], spoken: Sequence[str]
) -> dict[str, Any]:
    header: dict[str, Any] = {}
    if naming == "hf-whisper":
        header["library_name"] = "transformers"
    if naming != "other":
        header["pipeline_tag"] = "automatic-speech-recognition"
    header["tags"] = ["lors-merging", "merge", *(["whisper"] if naming in _WHISPERS else [])]
    hub_ids = list(dict.fromkeys(source.hub_id for source in (base, *experts) if source.hub_id))
    if hub_ids:
        header["base_model"] = hub_ids
        header["base_model_relation"] = "merge"
    if found := languages((source.name for source in experts), spoken) or carried.get("language"):
        header["language"] = found
    header.update({key: carried[key] for key in ("license", "license_name", "license_link") if key in carried})
    return header


def code(text: object) -> str:
    """Text of any origin in Markdown, also in a table: a code span, in which nothing is markup and which nothing ends."""
    shown = printable(str(text)).replace("`", "\\x60").replace("|", "\\x7c")
    return f"`{shown}`" if shown.strip() else ""


def _render(
    header: Mapping[str, Any],
    base: Input,
    experts: Sequence[Input],
    method: str,
    parameters: Mapping[str, object],
    recipe: str,
    backend: str,
    naming: str,
) -> str:
    import yaml

    kind = "Whisper model" if naming in _WHISPERS else "model"
    fence = "`" * max([3, *(1 + len(run) for run in re.findall("`+", recipe))])
    parts = [
        f"---\n{yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True)}---",
        "# Merged " + kind,
        f"{code(base.origin)} and {len(experts)} fine-tuned expert{'s'[: len(experts) != 1]} of it, merged into one {kind} "
        f"with the method `{method}` of lors-merging."
        + (f" The method is described in {_PAPER}." if method == "lors" else ""),
        "## Parameters",
        _table(("parameter", "value"), [(code(name), code(value)) for name, value in parameters.items()]),
        "## Inputs",
        _inputs_table(base, experts),
        "## Made with",
        _table(("what", "version"), [*versions().items(), ("backend", backend)]),
        "## Recipe",
        f"`{RECIPE_FILE}` makes this model again: `lors merge {RECIPE_FILE} OUT`.",
        f"{fence}yaml\n{_ended(recipe)}{fence}",
    ]
    return "\n\n".join(parts) + "\n"


def _inputs_table(base: Input, experts: Sequence[Input]) -> str:
    rows = []
    for role, source in (("base", base), *(("expert", expert) for expert in experts)):
        weight = "" if source.weight is None else f"{source.weight:g}"
        for file, digest in source.sha256.items():
            rows.append((role, code(source.name), code(source.origin), weight, code(file), code(digest)))
    return _table(("role", "name", "from", "weight", "file", "sha256"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are Markdown: words of ours, or `code`."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def _ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"
