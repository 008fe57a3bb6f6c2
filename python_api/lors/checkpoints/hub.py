"""The files of a checkpoint by name, here and in the repositories of the Hugging Face hub, and the bases that come with lors."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import LorsError, near_path

__all__ = ["HUB_ID", "SHIPPED", "shipped"]

# What a merged model needs beside its weights, as transformers names the files.
SIDECARS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "feature_extractor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "normalizer.json", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_SINGLE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
OPENAI, NEMO = "model.pt", "model.nemo"  # what a merge of openai-whisper's and of NeMo's files writes
HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


# Tiny bases trained by speech/pretrain.py; bases/README.md holds the command and the log.
_BASES = Path(__file__).parent.parent / "speech" / "bases"
SHIPPED = {"tiny": _BASES / "final", "tiny-early": _BASES / "early"}


def shipped(source: str) -> Path | None:
    """The directory of the base that comes with lors under this name; LorsError where something here bears it too."""
    if source in SHIPPED and os.path.lexists(source):
        raise LorsError(
            f"{source}: a base that comes with lors is called so, and something here: {Path(source).absolute()} is the latter"
        )
    return SHIPPED.get(source)


class SourceNotFound(LorsError):
    """There is no checkpoint of this name, here or on the hub."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}{near_path(source)}")
        self.source, self.reason = source, reason

    def __reduce__(self) -> tuple[type[SourceNotFound], tuple[str, str]]:
        return SourceNotFound, (self.source, self.reason)


# Only the main weights: repositories often hold the same weights again for other frameworks or precisions.
SAFETENSORS_PATTERNS = ["model.safetensors", "model-*-of-*.safetensors", INDEX]
TORCH_PATTERNS = [TORCH_SINGLE, "pytorch_model-*-of-*.bin", TORCH_INDEX]


def download(repo: str, revision: str | None) -> Path:
    """The local snapshot of a hub repository: safetensors if it has them, else PyTorch's files."""
    for weights in (SAFETENSORS_PATTERNS, TORCH_PATTERNS):
        path = _snapshot(repo, revision, [*weights, *SIDECARS, "README.md"])
        if any((path / file).exists() for file in (weights[0], weights[2])):
            return path
    raise LorsError(f"{repo}: the hub repository has neither {SINGLE} nor {TORCH_SINGLE}")


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    label = f"{repo}@{revision}" if revision else repo
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise LorsError(
            f"{label}: not a file or directory here, and huggingface_hub, which fetches hub ids, is missing"
        ) from error
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise LorsError(
            f"{label}: access to this hub repository must be granted first; then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceNotFound(
            label, "not a file or directory here, and not a repository on the hub (or a private one)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise LorsError(f"{label}: the hub repository has no revision {revision!r}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise SourceNotFound(
            label, "not a file or directory here, not in the hub cache, and the hub cannot be reached"
        ) from error
    except Exception as error:  # network and HTTP errors come from several libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LorsError(f"{label}: cannot be fetched from the hub: {reason}") from error
