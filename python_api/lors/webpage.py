"""One self-contained HTML page: no script, no network, light and dark, readable on a phone, usable by keyboard.

Tables carry numbers and their shades; drawings are inline SVG whose text is never smaller than the page's small print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape as escape_markup

from .errors import printable
from .files.replaceable import HEAD

__all__ = ["Series", "escape", "document", "heat_table", "lines", "page", "scatter", "section", "table"]

Series = Mapping[str, Sequence[tuple[float, float]]]  # name -> points

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 300, 62, 44, 14, 16
MARKS = 6  # colours; a seventh series starts over with dashes

_STYLE = """
:root{color-scheme:light dark;--ink:#16191f;--soft:#4d5562;--paper:#fff;--panel:#f3f5f8;--rule:#c9d0da;--accent:#1d5fc4;
--c0:#1d5fc4;--c1:#b3480b;--c2:#1c7a3e;--c3:#9a2c8c;--c4:#80600a;--c5:#0b7285}
@media (prefers-color-scheme:dark){:root{--ink:#e9ecf1;--soft:#aeb6c3;--paper:#14171c;--panel:#1d2128;--rule:#3b4350;
--accent:#7db0ff;--c0:#7db0ff;--c1:#ff9e64;--c2:#6fd68f;--c3:#ea8fdd;--c4:#e0bd57;--c5:#5fd0e0}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem clamp(.75rem,3vw,2rem) 4rem;max-width:76rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.2rem;margin:2.2rem 0 .5rem}p,ul{max-width:65ch}
.lead{color:var(--soft)}nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;list-style:none;padding:0;max-width:none}
nav a{display:inline-block;padding:.35rem 0}a{color:var(--accent)}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:6px;margin:.6rem 0}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .65rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
th:first-child,td:first-child{text-align:left}thead th{background:var(--panel);color:var(--ink);vertical-align:bottom}
tbody tr:last-child>*{border-bottom:0}tbody th{font-weight:400}caption{caption-side:top;text-align:left;padding:.5rem .65rem;color:var(--soft)}
td.heat{background:color-mix(in srgb,var(--accent) calc(var(--v)*45%),transparent)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,33rem),1fr));gap:1rem}
figure{margin:.6rem 0;background:var(--panel);border-radius:6px;padding:.75rem;min-width:0}
figcaption{font-size:.9rem;margin-bottom:.4rem}svg{display:block;min-width:30rem;width:100%;height:auto}
figure .scroll{border:0;margin:0}svg text{fill:var(--ink);font-size:15px}svg .axis{stroke:var(--soft);fill:none}
svg .grid{stroke:var(--rule);stroke-width:1}.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;list-style:none;padding:0;margin:.4rem 0 0;font-size:.9rem}
.swatch{display:inline-block;width:1.4em;height:0;border-top:3px solid;vertical-align:middle;margin-right:.4em}
.s0{color:var(--c0)}.s1{color:var(--c1)}.s2{color:var(--c2)}.s3{color:var(--c3)}.s4{color:var(--c4)}.s5{color:var(--c5)}
path.line{stroke:currentColor;fill:none;stroke-width:2}.dash{stroke-dasharray:6 4;border-top-style:dashed}
circle{fill:currentColor;fill-opacity:.75}details{margin:.5rem 0}summary{cursor:pointer;padding:.4rem 0;font-weight:600}
@media print{.scroll{overflow:visible}}
"""


def escape(text: str) -> str:
    """Text of any origin as HTML, in an element or an attribute: no markup, nothing that is not seen."""
    return escape_markup(printable(text))


def document(title: str, style: str, body: str, head: str = "") -> str:
    """What every page begins and ends with. `body` is HTML from `<body>` on, `head` goes before the title."""
    return f"{HEAD}{head}<title>{escape(title)}</title><style>{style}</style></head>{body}</html>\n"


def page(title: str, lead: str, sections: Sequence[str], links: Mapping[str, str]) -> str:
    """The document. links: id of a section -> its heading, for the navigation."""
    items = "".join(f'<li><a href="#{escape(name)}">{escape(text)}</a></li>' for name, text in links.items())
    body = (
        f'\n<body><header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
        f'<nav aria-label="Sections"><ul>{items}</ul></nav></header>\n<main>\n'
        + "\n".join(sections)
        + "\n</main></body>"
    )
    return document(title, _STYLE, body, '<meta name="viewport" content="width=device-width,initial-scale=1">')


def section(name: str, heading: str, *parts: str) -> str:
    """A section with an anchor."""
    body = "\n".join(parts)
    return f'<section id="{escape(name)}" aria-labelledby="{escape(name)}-h"><h2 id="{escape(name)}-h">{escape(heading)}</h2>{body}</section>'


def _region(label: str, content: str) -> str:
    # Focusable, because what is scrolled by a finger or a wheel must be scrollable by keys.
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>'


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of text; the first cell of each is its header."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    content = f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return _region(caption, content)


def heat_table(
    caption: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[float | None]],
    unit: str = "{:.2f}",
    top: float | None = None,
) -> str:
    """Numbers shaded by their magnitude; None is an empty cell. top: the magnitude of the darkest shade."""
    largest = (
        top
        or max((abs(v) for row in rows.values() for v in row if v is not None and math.isfinite(v)), default=1.0)
        or 1.0
    )

    def cell(value: float | None) -> str:
        if value is None:
            return "<td></td>"
        shade = min(1.0, abs(value) / largest) if math.isfinite(value) else 0.0
        return f'<td class="heat" style="--v:{shade:.3f}">{escape(unit.format(value + 0.0 if round(value, 2) else 0.0))}</td>'

    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *columns))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(map(cell, row))}</tr>' for name, row in rows.items()
    )
    return _region(
        caption,
        f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
    )


def lines(caption: str, series: Series, x: str, y: str, *, log: bool = False, zero: bool = True) -> str:
    """A line per series. log: both axes."""
    return _chart(caption, series, x, y, log=log, zero=zero, joined=True)


def scatter(caption: str, series: Series, x: str, y: str, *, log: bool = False) -> str:
    """A dot per point."""
    return _chart(caption, series, x, y, log=log, zero=False, joined=False)


def _chart(caption: str, series: Series, x: str, y: str, *, log: bool, zero: bool, joined: bool) -> str:
    def usable(point: tuple[float, float]) -> bool:
        return all(math.isfinite(v) and (v > 0 or not log) for v in point)

    kept = {name: [point for point in points if usable(point)] for name, points in series.items()}
    every = [point for points in kept.values() for point in points]
    if not every:
        return f"<figure><figcaption>{escape(caption)}: no values</figcaption></figure>"
    across = _Axis([p[0] for p in every], LEFT, WIDTH - RIGHT, log)
    up = _Axis([p[1] for p in every] + ([0.0] if zero and not log else []), HEIGHT - BOTTOM, TOP, log)
    parts = [_frame(across, up, x, y)]
    for index, points in enumerate(kept.values()):
        mark = f"s{index % MARKS}"
        places = [(across.at(a), up.at(b)) for a, b in points]
        if joined and len(places) > 1:
            d = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
            parts.append(f'<path class="line {mark}{" dash" if index >= MARKS else ""}" d="{d}"/>')
        else:
            parts += [f'<circle class="{mark}" cx="{a:.1f}" cy="{b:.1f}" r="5"/>' for a, b in places]
    label = f"{caption}. Horizontal: {x}. Vertical: {y}."
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    legend = "".join(
        f'<li><span class="swatch s{i % MARKS}{" dash" if i >= MARKS else ""}"></span>{escape(name)}</li>'
        for i, name in enumerate(kept)
    )
    names = f'<ul class="legend">{legend}</ul>' if len(kept) > 1 else ""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{_region(caption, svg)}{names}</figure>"


class _Axis:
    """Values to places, and round numbers to write beside it."""

    def __init__(self, values: Sequence[float], start: float, stop: float, log: bool) -> None:
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-12 * max(1.0, abs(high)):
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        margin = 0.03 * (high - low)
        self._low, self._high, self._start, self._stop, self._log = low - margin, high + margin, start, stop, log
        self.ticks = self._log_ticks(low, high) if log else self._round_ticks(low, high)

    def at(self, value: float) -> float:
        place = math.log10(value) if self._log else value
        return self._start + (place - self._low) / (self._high - self._low) * (self._stop - self._start)

    @staticmethod
    def _round_ticks(low: float, high: float) -> list[float]:
        rough = (high - low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
        first = math.ceil(low / step - 1e-9)
        return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]

    @staticmethod
    def _log_ticks(low: float, high: float) -> list[float]:
        every = [10.0**e * k for e in range(math.floor(low), math.ceil(high) + 1) for k in (1, 2, 5)]
        inside = [t for t in every if low - 1e-9 <= math.log10(t) <= high + 1e-9]
        return inside if len(inside) <= 6 else [t for t in inside if math.isclose(math.log10(t) % 1, 0, abs_tol=1e-9)]


def _frame(across: _Axis, up: _Axis, x: str, y: str) -> str:
    bottom = HEIGHT - BOTTOM
    parts = []
    for tick in up.ticks:
        place = up.at(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{place + 5:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in across.ticks:
        parts.append(f'<text x="{across.at(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:.3g}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
    parts.append(
        f'<text transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
    )
    return "".join(parts)
