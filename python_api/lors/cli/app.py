"""The `lors` command. Only this file and what a sub-command needs is imported, so that `lors --help` is instant."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..command import as_options, one_line_errors
from ..errors import LorsError, SettingError, print_lines
from ..public import public
from ..speech.commands import COMMANDS as SPEECH_COMMANDS

if TYPE_CHECKING:
    from ..engine.report import MergeReport

app = typer.Typer(
    name="lors",
    help="Merge fine-tuned Whisper experts into one model: low rank plus sparse, at file speed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point."""
    run(app)


def run(command: typer.Typer) -> None:
    """Runs a command: what is wrong is one line, and the exit code says the kind of it."""
    from ..console import standard_streams
    from ..files.signals import terminate_cleanly

    with one_line_errors(), terminate_cleanly(), standard_streams(), as_options(lambda: _own_options(command)):
        status = command(prog_name="lors", standalone_mode=False)
        if status == 130:  # how the library hands Ctrl-C on
            raise KeyboardInterrupt
        if status:
            raise SystemExit(status)


def _own_options(app: typer.Typer) -> dict[str, str]:
    """Argument -> option of the command that is run."""
    command = typer.main.get_command(app).commands.get(next(iter(sys.argv[1:]), ""))  # type: ignore[attr-defined]
    names = [name for option in command.params for name in option.opts] if command else []
    return {name[2:].replace("-", "_"): name for name in names}


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from .. import __version__

        print(f"lors {__version__}")
        raise typer.Exit


def merge(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="[RECIPE.yml] OUT", help="A recipe and the directory to write, or only the latter."),
    ],
    base: Annotated[str | None, typer.Option(help="Base checkpoint: directory, file or hub id.")] = None,
    expert: Annotated[list[str] | None, typer.Option(metavar="[NAME=]PATH", help="An expert; repeat for each.")] = None,
    method: Annotated[
        str | None, typer.Option(help="lors, task_arithmetic, linear, svp, magnitude_prune ... (default: lors)")
    ] = None,
    rank: Annotated[float | None, typer.Option(help="Singular triplets kept; below 1 a fraction of min(m, n).")] = None,
    density: Annotated[float | None, typer.Option(help="Share of the remaining entries kept.")] = None,
    lam: Annotated[float | None, typer.Option("--lambda", help="Factor of the sum over the experts.")] = None,
    weight: Annotated[list[str] | None, typer.Option(metavar="NAME=W", help="Factor of one expert; repeat.")] = None,
    param: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any other parameter of the method; repeat.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Decompose matrices with such names; repeat.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="REGEX", help="Do not decompose these; repeat.")] = None,
    rest: Annotated[str | None, typer.Option(help="Other tensors: task_arithmetic, average or base.")] = None,
    backend: Annotated[str | None, typer.Option(help="Kernels to use; see `lors doctor`.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads (default: LORS_THREADS, OMP_NUM_THREADS or all cores).")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cuda[:N,...]", help="Decompose on GPUs; --backend then names theirs.")
    ] = None,
    device_memory: Annotated[
        float | None, typer.Option(min=0, metavar="GB", help="To use on each GPU (default: 80 % of what is free).")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the written weights (default: the base's).")] = None,
    out_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest weight file (default: 5GB).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Reload the result and compare a sample with the method's definition.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, merge nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    fsync: Annotated[bool, typer.Option("--fsync/--no-fsync", help="Be safe against power failure too.")] = True,
    ray: Annotated[str | None, typer.Option(metavar="local|ADDRESS", help="Decompose on a Ray cluster.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print a row for every layer kind.")] = False,
) -> None:
    """Merge experts into one checkpoint, by a recipe or by options.

    lors merge recipe.yml OUT
    lors merge --base BASE --expert ca=DIR --expert de=DIR OUT
    """
    given = {
        "rank": rank, "density": density, "lambda": lam, "weight": _pairs(weight, "--weight", float), **_pairs(param, "--param", _scalar)
    }  # fmt: skip
    settings: dict[str, Any] = {
        "target": {"include": include or [], "exclude": exclude or []} if include or exclude else None,
        "rest": rest, "out_dtype": dtype, "out_shard_size": out_shard_size, "seed": seed,
    }  # fmt: skip
    parameters = {key: value for key, value in given.items() if value not in (None, {})}
    settings = {key: value for key, value in settings.items() if value is not None}
    experts = _experts(expert or [], "--expert")
    described = bool(base or experts or method or parameters or settings)
    file, out = _recipe_and_out(paths, described, bool(experts))

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
            with _progress(quiet or as_json) as progress:
                report = merge_recipe(
                    recipe, out, backend=backend, threads=threads, device=device,
                    device_memory=None if device_memory is None else int(device_memory * 1e9),
                    force=force, durable=fsync, check=check, progress=progress, ray=ray,
                )  # fmt: skip
    if as_json or not quiet:
        _tell(report, as_json, verbose, rehearsal=dry_run)


def _recipe_and_out(paths: Sequence[str], described: bool, experts: bool) -> tuple[Path | None, str]:
    """The two arguments of `merge`, told apart; `described`: options print_lines what is merged."""
    usage = "lors merge --base DIR --expert NAME=DIR OUT"
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


def _experts(items: Sequence[str], where: str) -> dict[str, str]:
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


def _keys(experts: Iterable[str], parameters: Iterable[str]) -> dict[str, str]:
    """Key of the recipe that the options make -> option."""
    keys = {
        "merge_method": "--method", "base_model": "--base", "models": "--expert", "out_dtype": "--dtype",
        "out_shard_size": "--out-shard-size", "target": "--include", "target.include": "--include",
        "target.exclude": "--exclude",
    }  # fmt: skip
    keys |= {f"parameters.{name}": f"--param {name}" for name in parameters}
    keys |= {f"parameters.{name}": f"--{name}" for name in ("rank", "density", "lambda", "weight")}
    for index, name in enumerate(experts):
        keys |= {f"expert {name!r}": f"--expert {name}", f"models[{index}].model": f"--expert {name}"}
        keys |= {f"models[{index}].parameters.weight": f"--weight {name}", f"models[{index}].name": f"--expert {name}"}
    return keys


def _pairs(items: list[str] | None, option: str, convert: Callable[[str], Any]) -> dict[str, Any]:
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


def _scalar(text: str) -> Any:
    from ..recipes import strict_yaml

    value = strict_yaml.parse(text, repr(text))
    if not isinstance(value, (bool, int, float, str)):
        raise LorsError(f"expected a number, true, false or a word, got {text!r}")
    return value


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal; nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("merging"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("merging", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _tell(report: MergeReport, as_json: bool, verbose: bool = False, rehearsal: bool = False) -> None:
    """Prints a report; that it cannot be printed is no failure of what it reports."""
    try:
        if as_json:
            print(json.dumps(report.to_dict(), indent=2))
        else:
            show_report(report, verbose, rehearsal)
        sys.stdout.flush()
    except LorsError as error:
        done = "the dry run passed" if rehearsal else f"{report.out} is complete"
        raise LorsError(f"{done}, but {error}") from error


def show_report(report: MergeReport, verbose: bool = True, rehearsal: bool = False) -> None:
    """The report as a table and three lines; of a rehearsal, which took no time and wrote nothing, without the last."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    rows = [row for row in report.kinds if row.decomposed]
    if rows and verbose:
        table = Table("layer kind", *("matrices", "entries", "energy in L", "energy in S", "lost"), box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            shares = (row.low_share, row.sparse_share, 1 - row.low_share - row.sparse_share)
            table.add_row(row.kind, str(row.tensors), f"{row.entries:,}", *(f"{100 * share:.1f} %" for share in shares))
        console.print(table)
    elif rows:
        energy = sum(row.delta_energy for row in rows) or 1.0
        low, sparse = (sum(getattr(row, name) for row in rows) / energy for name in ("low_energy", "sparse_energy"))
        print(
            f"energy of the task vectors kept: {100 * low:.1f} % in L, {100 * sparse:.1f} % in S (-v: per layer kind)"
        )
    for notice in report.notices:
        print_lines(f"note: {notice}")
    print_lines(
        f"{report.method}: {len(report.experts)} experts, {report.tensors} tensors, {report.decomposed} decomposed, "
        f"backend {report.backend}, {report.threads} threads"
    )
    if rehearsal:
        return
    print_lines(
        f"{report.seconds:.2f} s, {report.gb_per_second:.2f} GB/s read and written, "
        f"peak memory {report.peak_memory / 1e6:.0f} MB" + (f" -> {report.out}" if report.out else "")
    )


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Directory, file or hub id.")],
    base: Annotated[str | None, typer.Option(help="Describe the difference to this checkpoint.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank whose share of the energy is shown.")] = 7,
    top: Annotated[int, typer.Option(min=1, help="Singular values shown per matrix.")] = 5,
    match: Annotated[str | None, typer.Option(metavar="REGEX", help="Only tensors with such names.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the spectra (needs matplotlib).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What is in a checkpoint; with --base, the spectrum of every task vector."""
    from ..analysis.inspect import inspect_command

    inspect_command(checkpoint, base, rank=rank, top=top, match=match, plot=plot, as_json=as_json)


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


def bench(
    backend: Annotated[
        list[str] | None, typer.Option(help="Only this backend; repeat (default: all that are available).")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Matrices of this model's shapes (default: two of whisper-small).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, float16 or bfloat16.")] = "float32",
    rank: Annotated[int, typer.Option(min=1, help="Of the low-rank part.")] = 7,
    density: Annotated[float, typer.Option(help="Share of entries kept of the rest.")] = 0.2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time every kernel operation here, beside plain torch and against the peaks of this machine; exit code 1 if one is
    wrong.

    Half a minute on two cores. LORS_THREADS sets the threads, of torch too.
    """
    from lors_kernels import BackendUnavailable
    from lors_kernels.testing.bench import DEFAULT_SHAPES, bench_command

    shapes = list(DEFAULT_SHAPES.values()) if checkpoint is None else _decomposed_shapes(checkpoint)
    try:
        right = bench_command(backend, shapes=shapes, dtype=dtype, rank=rank, density=density, as_json=as_json)
    except (BackendUnavailable, ValueError) as error:
        name, _, problem = str(error).partition(": ")
        known = name in ("backend", "dtype", "rank", "density")
        raise SettingError(name if known else "backend", problem if known else str(error)) from None
    if not right:
        raise typer.Exit(1)


def _decomposed_shapes(source: str) -> list[tuple[int, int]]:
    """Of the matrices of this checkpoint that a merge decomposes, the smallest first."""
    from ..checkpoints.layers import select
    from ..checkpoints.reader import open_checkpoint

    with open_checkpoint(source) as model:
        chosen = select(model.tensors, model.naming, model.config).names
        shapes = {(rows, columns) for rows, columns in (model.tensors[name].shape for name in chosen)}
    if not shapes:
        raise LorsError(f"{source}: no decomposed matrix")
    return sorted(shapes, key=lambda shape: shape[0] * shape[1])


def mergekit_yaml(ctx: typer.Context) -> None:
    """mergekit's own command, CONFIG OUT and its flags, with our methods and kernels under it."""
    from ..integrations.mergekit import mergekit_yaml as run

    run(ctx.args)


# --- expert files ----------------------------------------------------------------------------------------------------


def decompose(
    base: Annotated[str, typer.Argument(help="Base checkpoint: directory, file or hub id.")],
    expert: Annotated[str, typer.Argument(help="Fine-tuned checkpoint.")],
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="File to write, such as ca.lors.safetensors.")
    ],
    rank: Annotated[float, typer.Option(help="Singular triplets stored; below 1 a fraction of min(m, n).")] = 7,
    density: Annotated[float, typer.Option(help="Share of the remaining entries stored.")] = 0.2,
    values: Annotated[str, typer.Option(help="Type of the sparse part: float32, float16 or bfloat16.")] = "float16",
    index: Annotated[str, typer.Option(help="Its places: mask, gaps, or auto (the smaller).")] = "auto",
    remainder: Annotated[
        str, typer.Option(help="Tensors that are not decomposed: float32, float16, int8 or none.")
    ] = "float16",
    name: Annotated[str | None, typer.Option(help="What the expert is called (default: its directory).")] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Decompose matrices with such names; repeat.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="REGEX", help="Do not decompose these; repeat.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the decomposition.")] = 0,
    backend: Annotated[str | None, typer.Option(help="Kernels to use; see `lors doctor`.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads (default: LORS_THREADS, OMP_NUM_THREADS or all cores).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Store an expert as low rank plus sparse, in a fraction of its size; `merge`, `add` and `remove` take it."""
    from ..experts.decompose import decompose as run

    target = {"include": include or [], "exclude": exclude or []} if include or exclude else None
    with as_options(lambda: {"target.include": "--include", "target.exclude": "--exclude"}):
        done = run(
            base, expert, out, rank=rank, density=density, values=values, index=index, remainder=remainder, name=name,
            target=target, seed=seed, backend=backend, threads=threads, force=force,
        )  # fmt: skip
    if as_json:
        print(json.dumps(done.to_dict(), indent=2))
    else:
        print_lines(
            f"{done.path}: {done.bytes / 1e6:.1f} MB, {100 * done.share:.1f} % of the checkpoint; {done.matrices} matrices "
            f"decomposed, stored to {done.error:.1e} of the update's norm, {done.seconds:.2f} s"
        )


def add(
    merged: Annotated[str, typer.Argument(help="Directory written by `lors merge`.")],
    expert: Annotated[str, typer.Argument(help="Expert file of the same base.")],
    name: Annotated[str | None, typer.Option(help="What to call it (default: its own name).")] = None,
    weight: Annotated[float | None, typer.Option(help="Its factor (default: the recipe's).")] = None,
    backend: Annotated[str | None, typer.Option(help="Kernels to use; see `lors doctor`.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads (default: LORS_THREADS, OMP_NUM_THREADS or all cores).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Add one expert to a merged model, in place and in one step."""
    from ..merging.edit import edit

    _tell(edit(merged, expert, name=name, weight=weight, backend=backend, threads=threads), as_json)


def remove(
    merged: Annotated[str, typer.Argument(help="Directory written by `lors merge`.")],
    expert: Annotated[str, typer.Argument(help="Expert file that was merged, or made from the checkpoint that was.")],
    name: Annotated[str | None, typer.Option(help="Which one, when it is in the model twice.")] = None,
    backend: Annotated[str | None, typer.Option(help="Kernels to use; see `lors doctor`.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads (default: LORS_THREADS, OMP_NUM_THREADS or all cores).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Take one expert out of a merged model, in place and in one step."""
    from ..merging.edit import edit

    _tell(edit(merged, expert, remove=True, name=name, backend=backend, threads=threads), as_json)


def export_lora(
    expert: Annotated[str, typer.Argument(help="Expert file.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Adapter directory to write.")],
    base: Annotated[str | None, typer.Option(help="What PEFT shall call the base model: a hub id or a path.")] = None,
    scale: Annotated[float, typer.Option(help="Factor of L, such as lambda.")] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR.")] = False,
) -> None:
    """Write the low-rank part of an expert as a PEFT LoRA adapter."""
    from ..experts.lora import export_lora as run

    print_lines(f"{out}: {run(expert, out, base=base, scale=scale, force=force)} matrices")


# --- sweeps ----------------------------------------------------------------------------------------------------------


def sweep(
    recipe: Annotated[Path, typer.Argument(help="Recipe whose settings are varied.")],
    score: Annotated[
        str, typer.Option(metavar="CMD|MODULE:FUNCTION", help="Scores a merged directory; its last line is the score.")
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="DIR", help="Directory or URL of the sweep; the same again goes on.")
    ],
    rank: Annotated[str | None, typer.Option(metavar="VALUES", help="1,2,4 or FROM:TO:STEP or FROM:TO.")] = None,
    density: Annotated[str | None, typer.Option(metavar="VALUES", help="As --rank.")] = None,
    lam: Annotated[str | None, typer.Option("--lambda", metavar="VALUES", help="As --rank.")] = None,
    param: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUES", help="Any other parameter; repeat.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Compare methods with as many trials each; repeat.")] = None,
    objective: Annotated[
        list[str] | None, typer.Option(metavar="NAME[:min|max]", help="What the scorer reports; repeat.")
    ] = None,
    sampler: Annotated[str, typer.Option(help="grid, random or tpe (Optuna).")] = "grid",
    trials: Annotated[int | None, typer.Option(min=1, help="Trials per method (default: the whole grid).")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Trials at a time.")] = 1,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for the models of trials, such as 8GB.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds a scorer may take.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the samplers and decompositions.")] = 0,
    backend: Annotated[str | None, typer.Option(help="Kernels to use; see `lors doctor`.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of all trials (default: all cores).")] = None,
    ray: Annotated[str | None, typer.Option(metavar="local|ADDRESS", help="Run trials on a Ray cluster.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try trials again that failed in an earlier run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Merge and score many settings; the experts are decomposed once, a killed sweep goes on where it was."""
    from ..methods import SPECS
    from ..recipes.entries import parse_size
    from ..recipes.recipe import Recipe
    from ..sweep.run import sweep as run
    from ..sweep.trials import Trial

    given = {"rank": rank, "density": density, "lambda": lam, **_pairs(param, "--param", str)}
    options = {name: text for name, text in given.items() if text is not None}
    if not options:
        raise LorsError("sweep: expected something to vary: --rank, --density, --lambda or --param")
    try:
        budget = None if memory is None else parse_size(memory)
    except ValueError as error:
        raise LorsError(f"--memory: {error}") from None

    def show(trial: Trial) -> None:
        if not quiet:
            setting = ", ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.settings.items()
            )
            result = ", ".join(f"{value:.5g}" for value in trial.values) or f"{trial.state}: {trial.error}"
            print_lines(f"{trial.method} {trial.number}: {setting}: {result}")

    done = run(
        Recipe.load(recipe, SPECS), options, score, out, methods=method or (), objectives=objective or ("score",),
        sampler=sampler, trials=trials, jobs=jobs, memory=budget, timeout=timeout, seed=seed, backend=backend,
        threads=threads, ray=ray, retry=retry, progress=show,
    )  # fmt: skip
    best = done.best()
    if best is not None and not quiet:
        print_lines(
            f"best: {best.method} {best.number}, {done.objectives[0].name} {best.values[0]:.5g} "
            f"-> {public(out)}/best.yml, {public(out)}/index.html"
        )


# --- interference ----------------------------------------------------------------------------------------------------


def report(
    base: Annotated[str, typer.Argument(help="Base checkpoint: directory, file or hub id.")],
    experts: Annotated[list[str], typer.Argument(metavar="[NAME=]EXPERT...", help="Checkpoints or expert files.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE.html", help="Page to write; the same as .json beside it.")
    ],
    rank: Annotated[float, typer.Option(help="Of L; below 1 a fraction of min(m, n).")] = 7,
    density: Annotated[float, typer.Option(help="Of S.")] = 0.2,
    match: Annotated[str | None, typer.Option(metavar="REGEX", help="Only matrices with such names.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: all cores).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a report in FILE.html and FILE.json.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """How experts interfere: energies, spectra, subspaces, sign conflicts, layer by layer, as one page and as JSON."""
    from ..analysis.interference import interference
    from ..analysis.interference_page import findings, output_files, render

    named = _experts(experts, "report")
    page, data = output_files(out, force)
    with _progress(quiet) as progress:
        found = interference(base, named, rank=rank, density=density, match=match, threads=threads, progress=progress)
    with page, data:
        page.write_text(render(found))
        data.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
        data.commit()
        page.commit()
    if not quiet:
        print_lines(*findings(found), f"-> {out}, {out.with_suffix('.json')}")


COMMANDS: dict[str, Callable[..., None]] = {
    "merge": merge,
    "inspect": inspect,
    "doctor": doctor,
    "validate": validate,
    "bench": bench,
    "mergekit-yaml": mergekit_yaml,
    "decompose": decompose,
    "add": add,
    "remove": remove,
    "export-lora": export_lora,
    "sweep": sweep,
    "report": report,
    **SPEECH_COMMANDS,
}
_OPTIONS: dict[str, dict[str, Any]] = {  # mergekit reads its own
    "mergekit-yaml": {"add_help_option": False, "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}},
}
for _name, _command in COMMANDS.items():
    app.command(_name, **_OPTIONS.get(_name, {}))(_command)
