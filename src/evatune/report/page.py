"""One HTML file with text, tables and figures, without scripts, fonts or pictures from other files.

Tables with a name can be sorted and filtered by a script inside the file; without it they are ordinary tables.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evatune.files import write_text
from evatune.report.sorting import SCRIPT
from evatune.tables import Marked, Table, alignment, table_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Folded", "Heading", "Picture", "Section", "Table", "Verbatim", "row_id", "write_page"]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of a page."""

    figure: Figure
    """What to draw."""
    alt: str
    """What it shows, in words, for those who cannot see it."""
    caption: str = ""
    """A sentence below it."""


@dataclass(frozen=True, kw_only=True)
class Verbatim:
    """Text whose line breaks and spaces stay, such as the output of a program."""

    text: str
    """The text."""


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A table that is shown on request, such as the numbers of a figure."""

    title: str
    """What is shown before."""
    table: Table
    """The table."""


@dataclass(frozen=True, kw_only=True)
class Heading:
    """What the next blocks of a section are."""

    text: str
    """The heading."""


LEAST_FOR_CONTENTS = 4
"""Sections of a page that begins with links to them."""
MOST_UPRIGHT = 10
"""Columns of a table that fits a sheet of paper; more need one on its side."""
Block = str | Table | Picture | Verbatim | Folded | Heading


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page under a heading of its own."""

    title: str
    """The heading."""
    content: Sequence[Block]
    """Strings (a blank line ends a paragraph, `backticks` mark code), tables and pictures, in order."""


def write_page(path: str | Path, *, title: str, sections: Sequence[Section], lead: str = "") -> Path:
    """Write a page as one self-contained HTML file.

    Args:
        path: the file; it appears only when it is complete.
        title: title and first heading.
        sections: the parts, in order.
        lead: what stands under the title, as a text of a section.

    Returns:
        The path.
    """
    body = [f"<h1>{_escape(title)}</h1>", _paragraphs(lead, kind="lead"), _contents(sections)]
    for number, section in enumerate(sections, start=1):
        content = "\n".join(_html(block) for block in section.content)
        body.append(
            f'<section aria-labelledby="part-{number}">\n<h2 id="part-{number}">{_escape(section.title)}</h2>\n'
            f"{content}\n</section>"
        )
    named = any(isinstance(table, Table) and table.name for section in sections for table in _tables(section))
    script = f"<script>{SCRIPT}</script>\n" if named else ""
    text = _PAGE.format(title=_escape(title), style=_STYLE, body="\n".join(filter(None, body)), script=script)
    return write_text(path, text)


def _contents(sections: Sequence[Section]) -> str:
    """Return links to the sections, if they are more than a reader sees at once."""
    if len(sections) < LEAST_FOR_CONTENTS:
        return ""
    links = [f'<a href="#part-{number}">{_escape(one.title)}</a>' for number, one in enumerate(sections, start=1)]
    return f'<nav aria-label="Contents">{" · ".join(links)}</nav>'


def row_id(table: str, title: str) -> str:
    """Return the anchor of a row, or of a group of rows, of a table with a name.

    Args:
        table: the table's name.
        title: the first cell of the row, or the group's name.
    """
    return f"{table}-" + re.sub(r"[^\w.+-]+", "-", title)


def _tables(section: Section) -> list[Block]:
    return [block.table if isinstance(block, Folded) else block for block in section.content]


def _html(block: Block) -> str:
    match block:
        case Table():
            return _table(block)
        case Picture():
            return _picture(block)
        case Folded():
            return f"<details><summary>{_inline(block.title)}</summary>{_table(block.table)}</details>"
        case Heading():
            return f"<h3>{_inline(block.text)}</h3>"
        case Verbatim():
            return f'<pre tabindex="0">{_escape(block.text)}</pre>'
        case _:
            return _paragraphs(block)


def _table(table: Table) -> str:
    cells = table_cells(table.headers, table.rows)
    sides = [' class="number"' if side == "r" else "" for side in alignment(table.headers, cells)]
    titles = [
        f'<th scope="col"{side}>{_inline(title)}</th>' if title else "<td></td>"
        for title, side in zip(table.headers, sides, strict=True)
    ]
    head = f"<thead><tr>{''.join(titles)}</tr></thead>\n" if any(table.headers) else ""
    lines = []
    for row, shown in zip(table.rows, cells, strict=True):
        first, *rest = (_cell(*pair) for pair in zip(row, shown, strict=True))
        others = "".join(f"<td{side}>{cell}</td>" for cell, side in zip(rest, sides[1:], strict=True))
        anchor = f' id="{_escape(row_id(table.name, shown[0]))}" tabindex="-1"' if table.name else ""
        lines.append(f'<tr{anchor}><th scope="row"{sides[0]}>{first}</th>{others}</tr>')
    kind = f' class="sortable" id="table-{_escape(table.name)}"' if table.name else ""
    about = f' role="group" aria-label="{_escape(table.name)}"' if table.name else ""
    broad = ' class="broad"' if len(table.headers) > MOST_UPRIGHT else ""
    return (
        f'<figure{broad}><div class="wide" tabindex="0"{about}><table{kind}>{head}{_bodies(table, lines)}</table></div>'
        f"{_caption(table.caption)}</figure>"
    )


def _bodies(table: Table, lines: Sequence[str]) -> str:
    """Return the rows in a body, or in one for each group, under its title."""
    bodies, start = [], 0
    for group in table.groups:
        own = lines[start : start + group.n_rows]
        start += group.n_rows
        title = f'<th scope="rowgroup" colspan="{len(table.headers)}">{_inline(group.title)}</th>'
        anchor = _escape(row_id(table.name, group.name))
        bodies.append(_body([f'<tr class="group">{title}</tr>', *own], f' id="{anchor}" tabindex="-1"'))
    return "".join(bodies) if bodies else _body(lines)


def _body(lines: Sequence[str], anchor: str = "") -> str:
    rows = "\n".join(lines)
    return f"<tbody{anchor}>\n{rows}\n</tbody>"


def _cell(cell: object, shown: str) -> str:
    text = _inline(shown)
    if isinstance(cell, Marked):
        text = {"best": f"<strong>{text}</strong>", "second": f"<u>{text}</u>"}.get(cell.mark, text)
        text = f'<a href="{_escape(cell.href)}">{text}</a>' if cell.href else text
    return text


def _picture(picture: Picture) -> str:
    from evatune.report.style import render

    data = base64.b64encode(render(picture.figure, "svg")).decode("ascii")
    width, height = (round(96 * inches) for inches in picture.figure.get_size_inches())
    image = (
        f'<img src="data:image/svg+xml;base64,{data}" alt="{_escape(picture.alt)}" width="{width}" height="{height}">'
    )
    return f"<figure>{image}{_caption(picture.caption)}</figure>"


def _caption(text: str) -> str:
    return f"<figcaption>{_inline(text)}</figcaption>" if text else ""


def _paragraphs(text: str, *, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    parts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    return "\n".join(f"<p{mark}>{_inline(part)}</p>" for part in parts)


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _escape(text))


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
{script}</body>
</html>
"""

_STYLE = """
:root { --paper: #ffffff; --ink: #22272e; --muted: #5b6470; --line: #d9dde3; --shade: #f5f6f8; --accent: #b34a00; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #16191d; --ink: #e4e7eb; --muted: #a3acb8; --line: #363c44; --shade: #20252b; --accent: #f0a06a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 2rem 0 .25rem; }
p { margin: .75rem 0; max-width: 42rem; }
.lead { font-size: 1.1rem; color: var(--muted); }
figure { margin: 1.25rem 0; }
figcaption { color: var(--muted); font-size: .9rem; margin-top: .5rem; max-width: 42rem; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #ffffff; border-radius: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .45rem .75rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
a { color: var(--accent); }
td a, tbody th a { color: inherit; text-decoration: underline dotted var(--accent); text-underline-offset: .2em; }
td a:hover, tbody th a:hover { color: var(--accent); }
tr.group th { color: var(--muted); padding-top: 1rem; border-bottom: 0; }
tr:target, tbody:target { background: var(--shade); outline: 2px solid var(--accent); }
tr:target, tbody:target { scroll-margin: 4rem; }
summary { cursor: pointer; color: var(--accent); margin: .5rem 0; }
th button { all: unset; cursor: pointer; color: inherit; font-weight: 600; }
a:focus-visible, button:focus-visible, input:focus-visible, summary:focus-visible, .wide:focus-visible {
  outline: 2px solid var(--accent); }
th[aria-sort="ascending"] button::after { content: " \\2191"; }
th[aria-sort="descending"] button::after { content: " \\2193"; }
.filter { display: block; font-size: .85rem; color: var(--muted); margin-bottom: .4rem; }
.filter input { font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--line);
  border-radius: 4px; padding: .2rem .4rem; margin-left: .4rem; max-width: 60%; }
.number { text-align: right; }
td.number { white-space: nowrap; }
code, pre { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .88em; }
code { background: var(--shade); padding: .1em .3em; border-radius: 4px; }
pre { background: var(--shade); padding: .9rem 1rem; border-radius: 6px; overflow-x: auto;
  font-size: .8rem; line-height: 1.4; }
@page { margin: 16mm 14mm; }
@page broad { size: landscape; }
@media print {
  html { font-size: 12px; }
  body { font-size: 1rem; line-height: 1.4; }
  main, p, figcaption { max-width: none; }
  main { padding: 0; }
  h2 { margin-top: 1.5rem; }
  .filter, nav, details:not([open]) { display: none; }
  .wide { overflow: visible; }
  table { line-height: 1.3; }
  th, td { padding: .2rem .6rem .2rem 0; }
  th button { display: contents; }
  .broad, h3:has(+ .broad) { page: broad; }
  .broad thead th { writing-mode: vertical-rl; text-align: left; }
  .broad table { font-size: .62rem; }
  .broad th, .broad td { padding-right: .3rem; }
  td.number { white-space: normal; }
  a, td a, tbody th a, summary { color: inherit; text-decoration: none; }
  tr:target, tbody:target { background: none; outline: 0; }
  h2, h3, summary, tr.group, p:has(+ figure > img) { break-after: avoid; }
  figcaption { break-before: avoid; }
  thead, tr, img, pre, figure:has(img) { break-inside: avoid; }
  img { max-height: 21cm; width: auto; }
}
"""
