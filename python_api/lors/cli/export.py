"""`lors export`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..command import Json, Output, Quiet
from ..errors import print_lines


def export(
    model: Annotated[str, typer.Argument(help="Merged model or any Whisper: directory, file or hub id.")],
    to: Annotated[str, Output(metavar="TARGET", help="ctranslate2, ggml, onnx or openai.")],
    out: Annotated[str, Output("--out", "-o", metavar="DIR", help="Directory to write.")],
    dtype: Annotated[
        str | None,
        Output(help="float32 (not ggml), float16 or int8 (not openai); default: as it is stored, ggml float16."),
    ] = None,
    force: Annotated[bool, Output("--force", help="Replace DIR.")] = False,
    no_fsync: Annotated[bool, Output("--no-fsync", help="Go without safety against power failure.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a Whisper in the format of another program: faster-whisper, whisper.cpp, ONNX Runtime, openai-whisper."""
    from ..exporting.export import export as run

    report = run(model, out, to, dtype=dtype, force=force, durable=not no_fsync)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        print_lines(*(f"note: {notice}" for notice in report.notices))
        for name, size in report.files.items():
            print_lines(f"{size / 1e6:10.1f} MB  {name}")
        print_lines(f"{report.to}, {report.dtype}: {report.seconds:.2f} s -> {report.out}")
