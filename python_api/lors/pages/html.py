"""One self-contained HTML page: no script, no network, light and dark, readable on a phone, usable by keyboard.

It begins with what follows from the numbers, in words. Tables carry numbers and their shades; each drawing (`charts`) has its
numbers in a table beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from html import escape as escape_markup
from typing import NamedTuple

from ..errors import printable
from ..files.replaceable import HEAD
from .charts import Drawing
from .colours import DARK, LIGHT

__all__ = ["Section", "charts", "escape", "figure", "findings", "heat_table", "note", "page", "section", "table"]


_NUMBER = re.compile(r"[-+–]?\d|nan$|–$|$")
_WORDS, _STRONG = ' class="words"', ' class="strong"'


def _variables(scheme: Mapping[str, str]) -> str:
    return ";".join(f"--{name}:{colour}" for name, colour in scheme.items())


_STYLE = (
    f"""
:root{{color-scheme:light dark;{_variables(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}
"""
    + """
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem clamp(.75rem,3vw,2rem) 4rem;max-width:76rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.2rem;margin:2.2rem 0 .5rem}p,main>section>ul{max-width:70ch}
.lead,.note{color:var(--soft)}.note{font-size:.9rem}nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;list-style:none;padding:0}
nav a{display:inline-block;padding:.35rem 0}a{color:var(--accent)}code{background:var(--panel);padding:0 .2em}
#findings>ul{padding-left:1.2em}#findings li{margin:.3rem 0}#findings li:first-child{font-size:1.15rem;font-weight:600}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:6px;margin:.6rem 0}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .65rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
th:first-child,.words{text-align:left}thead th{background:var(--panel);vertical-align:bottom;white-space:normal;min-width:3.2rem;overflow-wrap:normal}
tbody tr:last-child>*{border-bottom:0}tbody th{font-weight:400;position:sticky;left:0;background:var(--paper);white-space:normal;
overflow-wrap:anywhere;min-width:11rem}tbody th.strong{font-weight:600}
caption{caption-side:top;text-align:left;padding:.5rem .65rem;color:var(--soft)}
td.heat{background:color-mix(in srgb,var(--accent) calc(var(--v)*45%),transparent)}td.best{font-weight:700;text-decoration:underline}
.charts figure{margin:0}.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1rem;align-items:start}
.beside{display:grid;gap:0 1rem;grid-template-columns:minmax(0,1fr)}
@media (min-width:60rem){.beside{grid-template-columns:minmax(0,23rem) minmax(0,1fr)}}
figure{margin:.6rem 0;background:var(--panel);border-radius:6px;padding:.75rem;min-width:0}figcaption{font-size:.9rem}
svg{display:block;width:100%;max-width:34rem;height:auto}svg *{stroke-linejoin:round}figure p{font-size:.9rem;margin:.3rem 0 0}
figure .scroll{background:var(--paper)}details{margin:.3rem 0}summary{cursor:pointer;padding:.4rem 0}
figure summary{font-size:.9rem;padding:.2rem 0}section>details>summary{font-weight:600}
@media print{.scroll{overflow:visible}}
"""
)


class Section(NamedTuple):
    """A part of a page: its anchor, its heading, and what is in it as HTML."""

    name: str
    heading: str
    body: str


def escape(text: str) -> str:
    """Text of any origin as HTML, in an element or an attribute: no markup, nothing that is not seen."""
    return escape_markup(printable(text))


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The document; the sections are its navigation."""
    links = "".join(f'<li><a href="#{escape(each.name)}">{escape(each.heading)}</a></li>' for each in sections)
    body = "\n".join(
        f'<section id="{escape(each.name)}" aria-labelledby="{escape(each.name)}-h">'
        f'<h2 id="{escape(each.name)}-h">{escape(each.heading)}</h2>{each.body}</section>'
        for each in sections
    )
    return (
        f'{HEAD}<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
        f'<style>{_STYLE}</style></head>\n<body><header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n<main>\n{body}\n</main></body></html>\n'
    )


def section(name: str, heading: str, *parts: str) -> Section:
    return Section(name, heading, "\n".join(parts))


def findings(sentences: Iterable[str]) -> Section:
    """What a page begins with: the first sentence is the conclusion."""
    items = "".join(f"<li>{escape(text)}</li>" for text in sentences)
    return section("findings", "What stands out", f"<ul>{items}</ul>")


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def charts(figures: Iterable[str]) -> str:
    """Figures, as many beside each other as fit."""
    return f'<div class="charts">{"".join(figures)}</div>'


def figure(caption: str, drawing: Drawing, numbers: str) -> str:
    """A drawing with its numbers: a table, or the anchor of the section that has them (`#trials`)."""
    shown = f'<p><a href="{escape(numbers)}">Numbers</a></p>' if numbers.startswith("#") else numbers
    if not numbers.startswith("#") and drawing.svg:
        shown = f"<details><summary>Numbers</summary>{numbers}</details>"
    label = f"{caption}. {drawing.described}"
    svg = drawing.svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg or note(drawing.described)}{shown}</figure>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], strong: Container[str] = ()) -> str:
    """Rows of text; the first cell of each is its header, bold if it is in `strong`. Columns of numbers stand to the right."""
    rows = list(rows)
    words = {i for i in range(1, len(head)) if any(not _NUMBER.match(row[i]) for row in rows)}

    def cells(row: Sequence[str]) -> str:
        return "".join(f"<td{_WORDS if i in words else ''}>{escape(cell)}</td>" for i, cell in enumerate(row) if i)

    return _table(caption, head, ((row[0], cells(row)) for row in rows), words, strong)


def heat_table(
    caption: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[float | None]],
    unit: str = "{:.2f}",
    span: tuple[float, float] | None = None,
    best: Sequence[float | None] = (),
    strong: Container[str] = (),
) -> str:
    """Numbers shaded by their magnitude; None is an empty cell. span: the magnitudes of the lightest and the darkest shade.
    best: of each column the number that is marked."""
    found = [abs(v) for row in rows.values() for v in row if v is not None and math.isfinite(v)]
    low, high = span or (0.0, max(found, default=1.0))

    def cell(value: float | None, mark: float | None) -> str:
        if value is None:
            return "<td></td>"
        shade = min(1.0, max(0.0, (abs(value) - low) / ((high - low) or 1.0))) if math.isfinite(value) else 0.0
        kind = "heat best" if mark is not None and value == mark else "heat"
        text = unit.format(value + 0.0 if round(value, 2) else 0.0)
        return f'<td class="{kind}" style="--v:{shade:.3f}">{escape(text)}</td>'

    marks = [*best, *[None] * (len(columns) - len(best))]
    cells = {name: "".join(map(cell, row, marks)) for name, row in rows.items()}
    return _table(caption, ("", *columns), cells.items(), (), strong)


def _table(
    caption: str, head: Sequence[str], rows: Iterable[tuple[str, str]], words: Container[int], strong: Container[str]
) -> str:
    top = "".join(f'<th scope="col"{_WORDS if i in words else ""}>{escape(cell)}</th>' for i, cell in enumerate(head))
    body = "".join(
        f'<tr><th scope="row"{_STRONG if name in strong else ""}>{escape(name)}</th>{cells}</tr>'
        for name, cells in rows
    )
    content = f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    # Focusable, because what is scrolled by a finger or a wheel must be scrollable by keys.
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">{content}</div>'
