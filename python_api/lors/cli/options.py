"""Options that several commands have, and what options are read with.

typer looks the types up where a command is defined: they are imported there, at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..command import Inputs, Machine
from ..errors import LorsError

Backend = Annotated[str | None, Machine(help="Kernels to use; see `lors doctor`.")]
Backends = Annotated[list[str] | None, Machine(help="Only this backend; repeat (default: all that are available).")]
Exclude = Annotated[list[str] | None, Inputs(metavar="REGEX", help="Do not decompose these; repeat.")]
Include = Annotated[list[str] | None, Inputs(metavar="REGEX", help="Decompose matrices with such names; repeat.")]
Threads = Annotated[
    int | None, Machine(metavar="N", min=1, help="CPU threads (default: LORS_THREADS, OMP_NUM_THREADS or all cores).")
]

# Of what works on recordings without texts: `calibrate` and `learn`.
BaseModel = Annotated[str, typer.Argument(help="Base checkpoint: directory or hub id.")]
Experts = Annotated[list[str], typer.Argument(metavar="[NAME=]EXPERT...", help="Checkpoints trained from it.")]
Recordings = Annotated[
    str, Inputs("--data", help="Manifest, covost2:DIR, common_voice:DIR or fleurs:[DIR]; texts are not read.")
]
LanguageOf = Annotated[list[str] | None, Inputs(metavar="NAME=CODE", help="Of one expert (default: its name); repeat.")]
Split = Annotated[str, Inputs(help="train, dev or test.")]
Limit = Annotated[int, Inputs(metavar="N", min=1, help="Utterances per expert.")]
SampleSeed = Annotated[int, Inputs(help="Which utterances --limit takes.")]
SpeechDevice = Annotated[str | None, Machine(help="cpu or cuda (default: cuda where there is one).")]
FeatureCache = Annotated[Path | None, Machine(help="Keep features in this directory.")]


def experts_of(items: Sequence[str], where: str) -> dict[str, str]:
    """Name -> path of `NAME=PATH`, or of a path, whose last part is the name; `where` they were given."""
    from ..files.remote import is_url
    from ..recipes.recipe import label_of

    experts: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals or is_url(item) or Path(item).exists():
            name, path = label_of(item), item
        if not (name and path):
            raise LorsError(f"{where}: expected NAME=PATH, or a path, got {item!r}")
        if name in experts:
            raise LorsError(
                f"{where}: {name!r} is given twice: {experts[name]} and {path}; NAME=PATH gives another name"
            )
        experts[name] = path
    return experts


def languages_of(items: list[str] | None, experts: Sequence[str]) -> dict[str, str]:
    """The code of each expert's language: what `--language NAME=CODE` says, else its name."""
    from ..speech.data.languages import parse_languages

    given = pairs_of(items, "--language", str)
    if odd := [name for name in given if name not in experts]:
        raise LorsError(f"--language: expected one of the experts {', '.join(experts)}, got {odd[0]!r}")
    return {name: parse_languages(given.get(name, name))[0] for name in experts}


def pairs_of(items: list[str] | None, option: str, convert: Callable[[str], Any]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            example = "; for all experts alike: --param weight=0.5" if option == "--weight" else ""
            raise LorsError(f"{option}: expected NAME=VALUE, got {item!r}{example}")
        if name in pairs:
            raise LorsError(f"{option}: {name!r} is given twice")
        try:
            pairs[name] = convert(value)
        except ValueError:
            raise LorsError(f"{option}: expected a number for {name!r}, got {value!r}") from None
        except LorsError as error:
            raise LorsError(f"{option} {name}: {error}") from None
    return pairs


def scalar(text: str) -> Any:
    from ..recipes import strict_yaml

    value = strict_yaml.parse(text, repr(text))
    if not isinstance(value, (bool, int, float, str)):
        raise LorsError(f"expected a number, true, false or a word, got {text!r}")
    return value


def method_names() -> list[str]:
    """What a shell completes --method with."""
    from ..methods import METHODS

    return list(METHODS)
