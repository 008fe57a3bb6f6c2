"""Drawings of pages, by matplotlib: SVG to be inlined, its text text and its colours those of the page's scheme.

matplotlib is optional (`lors-merging[plot]`): without it a drawing says so, and what is beside it has the numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import LorsWarning, printable
from .colours import LIGHT, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["WITHOUT", "Bar", "Drawing", "Series", "absent", "bars", "lines", "look", "scatter"]

Series = Mapping[str, Sequence[tuple[float, float]]]  # name -> points

WITHOUT = "matplotlib is not installed: pip install 'lors-merging[plot]'"
# In units of which a phone has about as many as pixels across; text stays readable there and grows on a desk.
_WIDTH, _TEXT, _LEFT, _RIGHT, _TOP, _BOTTOM, _ROW = 336, 12.5, 46, 14, 24, 42, 17
_LONGEST = 34  # characters of a name in a drawing
_MARKED = 24  # points of a line, beyond which marks would hide it


@dataclass(frozen=True)
class Drawing:
    """svg: the element, empty where nothing could be drawn. described: the axes in words, or why there is nothing."""

    svg: str
    described: str


@dataclass(frozen=True)
class Bar:
    """One row: a value with its interval, as a text too."""

    value: float
    shown: str
    style: Style
    low: float | None = None
    high: float | None = None


def absent() -> bool:
    """Whether nothing can be drawn."""
    return find_spec("matplotlib") is None


def look(text: float = _TEXT) -> dict[str, Any]:
    """matplotlib's settings for all drawings, on pages and in files."""
    ink, soft, rule = LIGHT["ink"], LIGHT["soft"], LIGHT["rule"]
    return {
        "svg.fonttype": "none", "svg.hashsalt": "lors", "text.parse_math": False, "font.size": text, "text.color": ink,
        "axes.titlesize": text, "axes.labelsize": text, "xtick.labelsize": text, "ytick.labelsize": text, "legend.fontsize": text,
        "axes.edgecolor": soft, "axes.labelcolor": ink, "xtick.color": soft, "ytick.color": soft, "xtick.labelcolor": ink,
        "ytick.labelcolor": ink, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": rule,
        "grid.linewidth": 0.8, "axes.axisbelow": True, "lines.linewidth": 2.0, "lines.markersize": 6.0, "legend.frameon": False,
        "legend.borderpad": 0, "legend.borderaxespad": 0.1, "legend.handlelength": 2.4, "legend.labelspacing": 0.25,
        "legend.columnspacing": 1.0, "legend.handletextpad": 0.5,
        "xtick.minor.size": 0, "ytick.minor.size": 0,
    }  # fmt: skip


def lines(
    series: Series, styles: Mapping[str, Style], x: str, y: str, *, log: bool = False, zero: bool = True
) -> Drawing:
    """A line per series. log: the horizontal axis is logarithmic. zero: the vertical one begins there."""
    return _curves(series, styles, x, y, log=log, zero=zero, joined=True)


def scatter(
    series: Series, styles: Mapping[str, Style], x: str, y: str, *, log: bool = False, ringed: str = ""
) -> Drawing:
    """A mark per point. ringed: a series whose points are those of others, which it puts rings around."""
    return _curves(series, styles, x, y, log=log, zero=False, joined=False, ringed=ringed)


def _curves(
    series: Series,
    styles: Mapping[str, Style],
    x: str,
    y: str,
    *,
    log: bool,
    zero: bool,
    joined: bool,
    ringed: str = "",
) -> Drawing:
    kept = {
        name: [(a, b) for a, b in points if math.isfinite(a + b) and (a > 0 or not log)]
        for name, points in series.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return Drawing("", "No values.")
    names = list(kept) if len(kept) > 1 else []
    columns = 2 if max(map(len, names), default=0) <= 15 else 1
    legend = _ROW * math.ceil(len(names) / columns)
    with _figure(210 + legend) as drawn:
        if drawn is None:
            return Drawing("", WITHOUT)
        figure, axes = drawn
        for name, points in kept.items():
            how = _RING if name == ringed else _drawn_as(styles[name], joined, len(points))
            axes.plot(*zip(*points, strict=True), label=_cut(name), **how)
        axes.set_xlabel(x)
        axes.set_title(y, loc="left", x=-(_LEFT - 6) / (_WIDTH - _LEFT - _RIGHT))
        across = [a for points in kept.values() for a, _ in points]
        if log:
            _log_ticks(axes, across)
        else:
            _round_ticks(axes.xaxis, whole=all(value == round(value) for value in across))
        _round_ticks(axes.yaxis)
        if zero:
            up = [0.0, *(b for points in kept.values() for _, b in points)]
            axes.set_ylim(min(up), max(up) + 0.06 * (max(up) - min(up) or 1.0))
        _place(axes, figure, _BOTTOM + legend)
        if names:
            figure.legend(loc="lower left", bbox_to_anchor=(0, 0), ncols=columns)
        return Drawing(_svg(figure), f"Horizontal: {x}. Vertical: {y}.")


_RING: dict[str, Any] = {
    "marker": "o", "markersize": 11, "markerfacecolor": "none", "color": LIGHT["ink"], "linestyle": "none",
}  # fmt: skip


def _drawn_as(style: Style, joined: bool, points: int) -> dict[str, Any]:
    marked = not joined or points <= _MARKED
    return {
        "color": style.colour, "linestyle": style.dash if joined else "none", "marker": style.shape if marked else "none",
        "fillstyle": style.fill, "markersize": 5 if joined else 6.5, "markeredgewidth": 1.2,
    }  # fmt: skip


def bars(rows: Mapping[str, Bar], x: str, *, zero: bool = True) -> Drawing:
    """A row per name: a bar from 0, or a mark where 0 is no beginning (zero=False), with its interval and its text."""
    if not rows:
        return Drawing("", "No values.")
    with _figure(34 * len(rows) + _BOTTOM + 6) as drawn:
        if drawn is None:
            return Drawing("", WITHOUT)
        figure, axes = drawn
        for place, (name, row) in enumerate(rows.items()):
            if zero:
                axes.barh(place, row.value, 0.36, color=row.style.colour)
            else:
                axes.plot(row.value, place, **_drawn_as(row.style, False, 1), zorder=3)
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [place, place], color=LIGHT["ink"], linewidth=1.4, marker="|")
            for at, text, side in ((0, _cut(name), "left"), (1, printable(row.shown), "right")):
                axes.text(at, place - 0.24, text, transform=axes.get_yaxis_transform(), ha=side, va="bottom")
        if not zero:
            axes.axvline(0, color=LIGHT["soft"], linewidth=1)
        axes.set(ylim=(len(rows) - 0.5, -0.9), yticks=[], xlabel=x)
        axes.spines["left"].set_visible(False)
        _round_ticks(axes.xaxis)
        _place(axes, figure, _BOTTOM, left=_RIGHT, top=2)
        return Drawing(_svg(figure), f"One row per name. Horizontal: {x}.")


def _cut(name: str) -> str:
    shown = printable(name)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"


@contextlib.contextmanager
def _figure(height: float) -> Iterator[tuple[Figure, Axes] | None]:
    if absent():
        warnings.warn(LorsWarning(f"the page has tables only, no drawings: {WITHOUT}"), stacklevel=2)
        yield None
        return
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(look()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's fonts draw the text
        figure = Figure(figsize=(_WIDTH / 72, height / 72))
        axes = figure.add_axes((0, 0, 1, 1))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        yield figure, axes


def _place(axes: Axes, figure: Figure, bottom: float, left: float = _LEFT, top: float = _TOP) -> None:
    height = figure.get_figheight() * 72
    axes.set_position(
        (left / _WIDTH, bottom / height, (_WIDTH - left - _RIGHT) / _WIDTH, (height - bottom - top) / height)
    )


def _round_ticks(axis: Any, whole: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=whole))
    axis.set_major_formatter("{x:.4g}")


def _log_ticks(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [k * 10.0**e for e in powers for k in (1, 2, 5) if low * 0.999 <= k * 10.0**e <= high * 1.001] or [low]
    if len(ticks) > 6:
        ticks = [tick for tick in ticks if f"{tick:e}"[0] == "1"]
    axes.set_xscale("log")
    axes.set_xticks(ticks[:: math.ceil(len(ticks) / 6)])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:.3g}")


# --- from a file of its own to an element of a page --------------------------------------------------------------------

_VARIABLES = {colour: f"var(--{name})" for name, colour in reversed(LIGHT.items())}


def _svg(figure: Figure) -> str:
    """The element without name spaces, metadata, fonts and identifiers that nothing refers to; colours as variables."""
    written = io.BytesIO()
    figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(written.getvalue())
    values = [value for each in root.iter() for value in each.attrib.values()]
    used = {found for value in values for found in re.findall(r"^#([\w-]+)", value)}
    for each in root.iter():
        each.tag, each.tail = each.tag.rpartition("}")[2], None
        each.attrib = {
            key.rpartition("}")[2]: _plain(key, value) for key, value in each.attrib.items() if key != "clip-path"
        }  # nothing is drawn beyond the axes
        if each.tag != "text":
            each.text = None
        if each.attrib.get("id") not in used:
            each.attrib.pop("id", None)
        for below in [below for below in each if below.tag.rpartition("}")[2] in ("metadata", "style", "clipPath")]:
            each.remove(below)
        _share_style(each)
    root.attrib = {"viewBox": root.attrib["viewBox"]}
    text = ElementTree.tostring(root, "unicode")
    own = f"d{hashlib.sha256(text.encode()).hexdigest()[:8]}-"  # drawings of one page do not refer into each other
    for name in used:
        text = text.replace(f'id="{name}"', f'id="{own}{name}"').replace(f'"#{name}"', f'"#{own}{name}"')
    return re.sub('#[0-9a-f]{6}(?=[;"])', lambda found: _VARIABLES.get(found[0], found[0]), text)


def _plain(key: str, value: str) -> str:
    if key == "style":
        value = re.sub(r"font-family:[^;]*;? ?", "", value)
    return re.sub(r"(\.\d\d)\d+", r"\1", value) if key in ("d", "x", "y", "transform", "style") else value


def _share_style(group: ElementTree.Element) -> None:
    """Of marks that are drawn alike the group has the style."""
    styles = {each.get("style") for each in group}
    if len(styles) == 1 and all(each.tag.rpartition("}")[2] == "use" for each in group):
        group.set("style", str(styles.pop()))
        for each in group:
            del each.attrib["style"]
