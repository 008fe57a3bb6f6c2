"""The files beside a model that the programs read: configuration, tokenizer, feature extractor."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import LorsError
from ..files.directory import OutputDirectory
from ..merging.older_files import older_files
from .model import Whisper
from .peer import converting, needed

__all__ = ["accompany"]


def accompany(
    whisper: Whisper, output: OutputDirectory, target: str, notices: list[str], names: Collection[str] | None = None
) -> None:
    """Copies those of `names` (None: all) that lie beside the weights, and makes those that can be made of them.

    tokenizer.json is always there: transformers makes it of a vocabulary and merges.
    """
    paths = whisper.checkpoint.sidecars()
    found = {path.name: path for path in paths if names is None or path.name in names}
    for path in found.values():
        output.copy(path)
    for name, text in older_files(paths, notices).items():
        if names is None or name in names:
            output.write_text(name, text)
    if "tokenizer.json" not in found:
        if not any(path.name == "vocab.json" for path in paths):
            raise LorsError(
                f"{whisper.name}: expected tokenizer.json, or vocab.json and merges.txt, beside the weights"
            )
        transformers = needed("transformers", target)
        with converting(whisper.name, "transformers"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(whisper.directory), local_files_only=True)
            tokenizer.backend_tokenizer.save(str(output.path / "tokenizer.json"))
