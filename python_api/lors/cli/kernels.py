"""Commands on the kernels alone: doctor, validate."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import SettingError


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Backends, each available or why not; threads, versions. Exit code 1 if something is broken or misconfigured."""
    from lors_kernels.__main__ import print_diagnosis

    if not print_diagnosis(as_json=as_json):
        raise typer.Exit(1)


def validate(
    backend: Annotated[
        list[str] | None, typer.Option(help="Only this backend; repeat (default: all that are available).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the matrices of real size.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every kernel operation against its definition on this machine; exit code 1 if one is wrong or none is there."""
    from lors_kernels import BackendUnavailable
    from lors_kernels.testing.validate import validate_command

    try:
        right = validate_command(backend, quick=quick, as_json=as_json)
    except (BackendUnavailable, ValueError) as error:
        raise SettingError("backend", str(error).removeprefix("backend: ")) from None
    if not right:
        raise typer.Exit(1)
