"""`lors merge`, and mergekit's own command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..command import Inputs, Json, Machine, Output, Quiet, Settings, as_options
from ..errors import LorsError
from ..progress import bar
from .options import Backend, Exclude, Include, Threads, experts_of, method_names, pairs_of, scalar
from .show import tell_report

# mergekit reads its own
OPTIONS: dict[str, dict[str, Any]] = {
    "mergekit-yaml": {
        "add_help_option": False,
        "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    },
}


def merge(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE.yml] OUT", help="A recipe and the directory to write, or only the latter."),
    ] = None,
    base: Annotated[str | None, Inputs(help="Base checkpoint: directory, file or hub id.")] = None,
    expert: Annotated[list[str] | None, Inputs(metavar="[NAME=]PATH", help="An expert; repeat for each.")] = None,
    method: Annotated[
        str | None,
        Settings(
            autocompletion=method_names, help="lors, task_arithmetic, ties, tsv, iso_cts, wudi ... (default: lors)"
        ),
    ] = None,
    rank: Annotated[float | None, Settings(help="Singular triplets kept; below 1 a fraction of min(m, n).")] = None,
    density: Annotated[float | None, Settings(help="Share of the remaining entries kept.")] = None,
    lam: Annotated[float | None, Settings("--lambda", help="Factor of the sum over the experts.")] = None,
    weight: Annotated[list[str] | None, Settings(metavar="NAME=W", help="Factor of one expert; repeat.")] = None,
    statistics: Annotated[
        list[str] | None, Inputs(metavar="NAME=FILE", help="What `lors calibrate` wrote for an expert; repeat.")
    ] = None,
    param: Annotated[
        list[str] | None, Settings(metavar="NAME=VALUE", help="Any other parameter of the method; repeat.")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    rest: Annotated[str | None, Settings(help="Other tensors: task_arithmetic, average or base.")] = None,
    rest_lambda: Annotated[
        float | None, Settings(help="Factor of the other tensors' sum or average (default: lambda, or 1).")
    ] = None,
    vocabulary: Annotated[
        str | None, Settings(help="base; or union: of experts with added tokens, rows matched by token.")
    ] = None,
    seed: Annotated[int | None, Settings(help="Of everything random.")] = None,
    backend: Backend = None,
    threads: Threads = None,
    device: Annotated[
        str | None,
        Machine(metavar="cuda[:N,...]", help="Merge on GPUs what is worth it; --backend then names their kernels."),
    ] = None,
    device_memory: Annotated[
        float | None, Machine(min=0, metavar="GB", help="To use on each GPU (default: 80 % of what is free).")
    ] = None,
    ray: Annotated[str | None, Machine(metavar="local|ADDRESS", help="Decompose on a Ray cluster.")] = None,
    dtype: Annotated[str | None, Output(help="Type of the written weights (default: the base's).")] = None,
    out: Annotated[
        str | None, Output("--out", "-o", metavar="OUT", help="The directory to write, as an option.")
    ] = None,
    out_shard_size: Annotated[str | None, Output(metavar="SIZE", help="Largest weight file (default: 5GB).")] = None,
    check: Annotated[
        bool, Output("--check", help="Reload the result and compare a sample with the method's definition.")
    ] = False,
    dry_run: Annotated[bool, Output("--dry-run", help="Check everything, merge nothing.")] = False,
    force: Annotated[bool, Output("--force", help="Replace OUT.")] = False,
    no_fsync: Annotated[bool, Output("--no-fsync", help="Go without safety against power failure.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Annotated[bool, Output("--verbose", "-v", help="Print a row for every layer kind.")] = False,
) -> None:
    """Merge experts into one checkpoint, by a recipe or by options.

    lors merge recipe.yml OUT
    lors merge --base BASE --expert ca=DIR --expert de=DIR OUT
    """
    given = {
        "rank": rank, "density": density, "lambda": lam, "rest_lambda": rest_lambda, "weight": pairs_of(weight, "--weight", float),
        "statistics": pairs_of(statistics, "--statistics", str), **pairs_of(param, "--param", scalar)
    }  # fmt: skip
    settings: dict[str, Any] = {
        "target": {"include": include or [], "exclude": exclude or []} if include or exclude else None,
        "rest": rest, "vocabulary": vocabulary, "out_dtype": dtype, "out_shard_size": out_shard_size, "seed": seed,
    }  # fmt: skip
    parameters = {key: value for key, value in given.items() if value not in (None, {})}
    settings = {key: value for key, value in settings.items() if value is not None}
    experts = experts_of(expert or [], "--expert")
    described = bool(base or experts or method or parameters or settings)
    file, out = _recipe_and_out([*(paths or ()), *([] if out is None else [out])], described, bool(experts))

    from ..merging.on_disk import dry_run as rehearse
    from ..merging.on_disk import merge_recipe
    from ..methods import SPECS
    from ..recipes.recipe import Recipe

    with as_options(lambda: {} if file else _keys(experts, parameters)):
        if file:
            recipe = Recipe.load(file, SPECS)
        else:
            recipe = Recipe.from_arguments(base, experts, method or "lors", methods=SPECS, **settings, **parameters)
        if dry_run:
            report = rehearse(
                recipe, out, backend=None if device else backend, threads=threads, device=device, force=force
            )
        else:
            with bar("merging", quiet=quiet or as_json) as progress:
                report = merge_recipe(
                    recipe, out, backend=backend, threads=threads, device=device,
                    device_memory=None if device_memory is None else int(device_memory * 1e9),
                    force=force, durable=not no_fsync, check=check, progress=progress, ray=ray,
                )  # fmt: skip
    tell_report(report, as_json=as_json, quiet=quiet, verbose=verbose, rehearsal=dry_run)


def _recipe_and_out(paths: Sequence[str], described: bool, experts: bool) -> tuple[Path | None, str]:
    """The two arguments of `merge`, told apart; `described`: options say what is merged."""
    usage = "lors merge --base DIR --expert NAME=DIR OUT"
    if not paths:
        raise LorsError("lors merge: missing argument [RECIPE.yml] OUT; see lors merge --help")
    if described and len(paths) > 1 and "=" not in paths[0] and Path(paths[0]).suffix not in (".yml", ".yaml"):
        raise LorsError(
            f"merge: {paths[0]!r} is no recipe (.yml); every model has an --expert of its own: --expert {paths[0]}"
        )
    if len(paths) > 2 or "=" in paths[0] and not Path(paths[0]).exists():
        raise LorsError(f"merge: expected [RECIPE.yml] OUT, got {' '.join(paths)}; models are options: {usage}")
    first, out = Path(paths[0]).expanduser(), paths[-1]
    if len(paths) == 1 and described:
        if not experts:
            raise LorsError("merge: expected at least one --expert NAME=DIR")
        return None, out
    if len(paths) == 1:
        if first.is_file() or first.suffix in (".yml", ".yaml"):
            raise LorsError(f"merge: expected OUT, the directory to write, after the recipe: lors merge {first} OUT")
        raise LorsError(f"merge: expected a recipe before OUT, or options that describe the merge: {usage}")
    if described:
        raise LorsError("merge: expected a recipe or options that describe the merge, got both; put them in the recipe")
    if first.is_dir():
        raise LorsError(f"{first}: expected a recipe, a YAML file, got a directory; models are options: {usage}")
    if not first.exists() and Path(out).is_file():
        raise LorsError(f"{first}: there is no such recipe; the output comes last: lors merge {out} {first}")
    return first, out


def _keys(experts: Iterable[str], parameters: Iterable[str]) -> dict[str, str]:
    """Key of the recipe that the options make -> option."""
    from ..methods import SPECS
    from ..recipes.parameters import REQUIRED

    required = {one.name for spec in SPECS.values() for one in spec.parameters if one.default is REQUIRED}
    keys = {
        "merge_method": "--method", "base_model": "--base", "models": "--expert", "out_dtype": "--dtype",
        "out_shard_size": "--out-shard-size", "target": "--include", "target.include": "--include",
        "target.exclude": "--exclude", "parameters.rest_lambda": "--rest-lambda",
    }  # fmt: skip
    keys = {f"parameters.{name}": f"--param {name}" for name in parameters} | keys
    keys |= {f"parameters.{name}": f"--{name}" for name in ("rank", "density", "lambda", "weight")}
    for index, name in enumerate(experts):
        keys |= {f"expert {name!r}": f"--expert {name}", f"models[{index}].model": f"--expert {name}"}
        # what can be missing of one model; below, what has an option of its own
        keys |= {f"models[{index}].parameters.{one}": f"--param {one}=VALUE" for one in required}
        keys |= {f"models[{index}].parameters.statistics": f"--statistics {name}"}
        keys |= {f"models[{index}].parameters.weight": f"--weight {name}", f"models[{index}].name": f"--expert {name}"}
    return keys


def mergekit_yaml(ctx: typer.Context) -> None:
    """mergekit's own command, CONFIG OUT and its flags, with our methods and kernels under it."""
    from ..integrations.mergekit import mergekit_yaml as run

    run(ctx.args)
