"""`lors inspect`: what is in a checkpoint, and how large and how low-rank its difference to a base is."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.compatibility import compare
from ..checkpoints.layers import kind, select
from ..checkpoints.reader import Checkpoint, open_checkpoint, require_unchanged
from ..errors import LorsError, print_lines
from ..pages import charts, colours
from .spectrum import effective_rank


@dataclass
class Spectrum:
    """The task vector of one matrix."""

    name: str
    shape: tuple[int, int]
    norm: float  # Frobenius
    relative: float  # norm over that of the base's matrix
    singular_values: list[float]  # all of them
    energy: float  # share of norm^2 in the `rank` largest
    effective_rank: float  # (sum sigma^2)^2 / sum sigma^4


def spectra(base: Checkpoint, expert: Checkpoint, rank: int, match: str | None = None) -> Iterator[Spectrum]:
    """Spectrum of every decomposed matrix, one at a time. Full SVDs: this explains, it does not merge."""
    compare(base, expert)
    matrices = set(select(base.tensors, base.naming, base.config).names)
    for name in (name for name in base.tensors if name in matrices and (not match or re.search(match, name))):
        w0 = base.read(name).astype(np.float32)
        delta = expert.read(expert.resolve(name) or name).astype(np.float32) - w0
        if not np.isfinite(delta).all():
            count = int(np.count_nonzero(~np.isfinite(delta)))
            raise LorsError(f"{expert.name}: tensor {name!r}: expected finite values, got {count} NaN or infinite")
        sigma = np.linalg.svd(delta, compute_uv=False).astype(np.float64)
        total = float((sigma**2).sum())
        share = sigma**2 / total if total else np.zeros_like(sigma)
        norm, scale = float(np.sqrt(total)), float(np.linalg.norm(w0))
        yield Spectrum(
            name,
            delta.shape,
            norm,
            norm / scale if scale else 0.0,
            sigma.tolist(),
            float(share[:rank].sum()),
            effective_rank(total, float((sigma**4).sum())),
        )


def inspect_command(
    source: str, base: str | None, *, rank: int, top: int, match: str | None, plot: Path | None, as_json: bool
) -> None:
    """Prints a description of a checkpoint, or of its difference to `base`."""
    if match:
        try:
            re.compile(match)
        except re.error as error:
            raise LorsError(f"--match: {match!r} is not a regular expression: {error}") from None
    if plot is not None and base is None:
        raise LorsError("--plot: expected --base too: it draws the spectra of the differences to it")
    if plot is not None and plot.exists():
        raise LorsError(f"{plot}: exists already; expected the name of a new file to draw")
    with open_checkpoint(source) as checkpoint:
        if base is None:
            _print_contents(checkpoint, match, as_json)
            return
        with open_checkpoint(base, name="base") as origin:
            found = list(spectra(origin, checkpoint, rank, match))
            require_unchanged((origin, checkpoint))
    if not found:
        raise LorsError(f"{source}: no decomposed matrix" + (f" has a name like {match!r}" if match else ""))
    if as_json:
        print(json.dumps([asdict(spectrum) for spectrum in found], indent=2))
    else:
        _print_spectra(found, rank, top)
    if plot is not None:
        draw(found, rank, plot)


def _print_contents(checkpoint: Checkpoint, match: str | None, as_json: bool) -> None:
    infos = [info for name, info in checkpoint.tensors.items() if not match or re.search(match, name)]
    if as_json:
        tensors = [{"name": i.name, "dtype": i.code, "shape": list(i.shape), "kind": kind(i.name)} for i in infos]
        files = [path.name for path in checkpoint.files]
        print(
            json.dumps(
                {"path": str(checkpoint.path), "naming": checkpoint.naming, "files": files, "tensors": tensors},
                indent=2,
            )
        )
        return
    config = checkpoint.config or checkpoint.dims or {}
    print_lines(
        f"{checkpoint.path}: {checkpoint.naming}, {len(checkpoint.files)} weight file(s), {len(checkpoint.tensors)} tensors"
    )
    told = {
        key: config[key]
        for key in ("model_type", "d_model", "encoder_layers", "decoder_layers", "vocab_size", "num_mel_bins")
        if key in config
    }
    if told:
        print_lines(", ".join(f"{key} {value}" for key, value in told.items()))
    rows: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for info in infos:
        row = rows[kind(info.name), info.code]
        for index, amount in enumerate((1, info.numel, info.nbytes)):
            row[index] += amount
    _print_table(
        ("kind", "dtype", "tensors", "entries", "MB"),
        [
            (name, code, str(n), f"{entries:,}", f"{size / 1e6:.1f}")
            for (name, code), (n, entries, size) in rows.items()
        ],
    )
    print_lines(f"total {sum(i.numel for i in infos):,} entries, {sum(i.nbytes for i in infos) / 1e6:.1f} MB")


def _print_spectra(found: list[Spectrum], rank: int, top: int) -> None:
    _print_table(
        ("matrix", "shape", "norm", "of base", f"energy r={rank}", "eff. rank", f"largest {top} singular values"),
        [
            (
                s.name, "x".join(map(str, s.shape)), f"{s.norm:.4g}", f"{100 * s.relative:.2f} %", f"{100 * s.energy:.1f} %",
                f"{s.effective_rank:.1f}", " ".join(f"{value:.3g}" for value in s.singular_values[:top]),
            )
            for s in found
        ],
    )  # fmt: skip
    energy = sum(s.norm**2 for s in found)
    kept = sum(s.energy * s.norm**2 for s in found) / energy if energy else 0.0
    print_lines(f"{len(found)} matrices, norm {energy**0.5:.4g}, rank {rank} keeps {100 * kept:.1f} % of the energy")


def _print_table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    widths = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print_lines("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def draw(found: list[Spectrum], rank: int, path: Path) -> None:
    """Normalised spectra: a thin line per matrix, the median of each layer kind thick."""
    if charts.absent():
        raise LorsError(f"--plot: {charts.WITHOUT}")
    import matplotlib
    from matplotlib.figure import Figure

    kinds: dict[str, list[np.ndarray]] = defaultdict(list)
    for spectrum in found:
        if spectrum.singular_values[0] > 0:
            kinds[kind(spectrum.name)].append(np.array(spectrum.singular_values) / spectrum.singular_values[0])
    with matplotlib.rc_context(
        charts.look(11)
    ):  # as wide as a README shows it, text has the size of the text around it
        figure = Figure(figsize=(8.3, 5.6), layout="constrained")
        axes = figure.subplots()
        for label, style in colours.of_names(kinds).items():
            spectra = kinds[label]
            for values in spectra:
                axes.plot(np.arange(1, len(values) + 1), values, color=style.colour, linewidth=0.6, alpha=0.25)
            middle = np.median([values[: min(map(len, spectra))] for values in spectra], axis=0)
            axes.plot(np.arange(1, len(middle) + 1), middle, color=style.colour, linestyle=style.dash, label=label)
        axes.set(xscale="log", yscale="log", ylim=(1e-4, 1.2), xlabel="i", ylabel="singular value i / largest")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.axvline(rank, color=colours.LIGHT["ink"], linestyle=":", linewidth=1.2, label=f"rank {rank}")
        axes.set_title("Spectra of the task vectors: median of each kind of matrix", loc="left")
        figure.legend(loc="outside lower center", ncols=3)
        try:
            figure.savefig(path, dpi=200)
        except (OSError, ValueError) as error:
            raise LorsError(f"--plot: cannot write {path}: {error}") from None
