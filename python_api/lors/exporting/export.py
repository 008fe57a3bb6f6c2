"""Exporting: a model to the files of another program.

    ctranslate2   CTranslate2 and faster-whisper
    ggml          whisper.cpp
    onnx          ONNX Runtime
    openai        openai-whisper

Nothing appears under the output's name until all of it is there.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

from ..errors import LorsError, SettingError, nearest
from ..files.directory import OutputDirectory
from ..files.remote import local_path
from ..files.replaceable import EXPORT
from ..public import public
from .model import opened

__all__ = ["TARGETS", "ExportReport", "export"]

TARGETS = ("ctranslate2", "ggml", "onnx", "openai")  # each a module here, which has DTYPES and `write`
_BYTES = {"float32": 4, "float16": 2, "int8": 1}  # of a weight


@dataclass
class ExportReport:
    """Result of `lors.export`: what was written, and what it cost."""

    out: str
    to: str
    dtype: str
    files: dict[str, int]  # name -> bytes
    seconds: float
    notices: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    dtype: str | None = None,
    force: bool = False,
    durable: bool = True,
) -> ExportReport:
    """Writes a Whisper in the format of another program.

    Args:
        model: a merged model or any other Whisper: a directory in transformers' format, a hub id, a URL; for `ggml` and
            `openai` also openai-whisper's .pt.
        out: directory to write; must not exist unless `force`.
        to: "ctranslate2", "ggml", "onnx" or "openai": `docs/how-to/export.md` says what each is and runs in.
        dtype: of the written weights: "float32" (but for `ggml`), "float16" or "int8" (but for `openai`). None: float16 for
            `ggml` and for a model that is stored in it, else float32.
        force: replace a directory in which there is nothing but an export.
        durable: survive a power failure right after (fsync).

    Raises:
        LorsError: the model is no Whisper, or none that the target can hold; a converter is missing; in one line, and then
            `out` is as it was before.
    """
    begun = time.perf_counter()
    if to not in TARGETS:
        raise SettingError("to", f"unknown target {to!r}{nearest(to, TARGETS)}")
    target = import_module(f".{to}", __package__)
    if dtype is not None and dtype not in target.DTYPES:
        raise SettingError("dtype", f"expected {' or '.join(target.DTYPES)} for {to}, got {dtype!r}")
    if isinstance(out, str):
        if (local := local_path(out)) is None:
            raise LorsError(f"{public(out)}: expected a directory of this machine to export to")
        out = local
    notices: list[str] = []
    with opened(model) as whisper:
        kind = dtype or (whisper.dtype if whisper.dtype in target.DTYPES else "float16")
        inputs = [whisper.checkpoint.path, *whisper.checkpoint.files]
        with OutputDirectory(out, force=force, inputs=inputs, durable=durable, kind=EXPORT) as output:
            output.require_space(_BYTES[kind] * sum(stored.info.numel for stored in whisper.weights))
            target.write(whisper, output, kind, notices)
            files = {path.name: path.stat().st_size for path in sorted(output.path.iterdir())}
            whisper.checkpoint.require_unchanged()
            output.commit()
    return ExportReport(str(out), to, kind, files, time.perf_counter() - begun, notices)
