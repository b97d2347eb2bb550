"""Tables and bars as text: for terminals and logs, Markdown, LaTeX and spreadsheets."""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from evatune.errors import EvaError

__all__ = [
    "Group",
    "Marked",
    "Table",
    "bar",
    "byte_size",
    "duration",
    "latex_table",
    "linked",
    "markdown_table",
    "number",
    "span",
    "text_table",
]

_NUMBER = re.compile(r"[-+−±~<>]?\.?\d|nan$|[-+−]?inf$")
_MISSING = "–"
CAPTION_WIDTH = 100
"""Characters of a line of a caption in a terminal."""
LEAST_WRAPPED = 20
"""Characters that the texts of a last column have at least, whatever the terminal's width."""
_BLOCKS = " ▏▎▍▌▋▊▉█"
_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
_SPECIAL |= {"±": r"$\pm$", "ρ": r"$\rho$", "α": r"$\alpha$", "–": "--", "−": "$-$", "Δ": r"$\Delta$", "×": r"$\times$"}
_SPECIAL |= {"β": r"$\beta$", "γ": r"$\gamma$", "λ": r"$\lambda$", "τ": r"$\tau$", "≥": r"$\geq$", "≤": r"$\leq$"}


@dataclass(frozen=True)
class Marked:
    """A cell that stands out among those that it is compared with."""

    value: object
    """What the cell shows."""
    mark: Literal["", "best", "second"] = ""
    """Bold and underlined where that is possible; a star and an apostrophe in plain text."""
    href: str = ""
    """Where the cell leads on a page."""
    text: str = ""
    """How the value is written, where that is not as other values."""
    also: Mapping[str, object] = field(default_factory=dict)
    """What else the text tells, for programs: columns of their own, by what follows the title of this one."""


def linked(cell: object, href: str) -> object:
    """Return a cell that leads somewhere on a page; the same cell if it leads nowhere."""
    if not href:
        return cell
    return replace(cell, href=href) if isinstance(cell, Marked) else Marked(cell, href=href)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows of a table that belong together."""

    name: str
    """What links call it."""
    title: str
    """What stands above its rows."""
    n_rows: int


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that can be shown in many ways."""

    headers: Sequence[str]
    """One title a column; without any, a page shows no head."""
    rows: Sequence[Sequence[object]]
    """The cells, shown as `text_table` shows them; the first of a row is its title."""
    caption: str = ""
    """A sentence below it."""
    name: str = ""
    """What programs call it."""
    groups: Sequence[Group] = ()
    """Groups of all its rows in their order, which a page shows; by default the rows are one."""

    def text(self, *, width: int | None = None) -> str:
        """Return it for a terminal of this width.

        Where all columns do not fit, those of one value are stated below, and further ones follow in tables of their
        own, each with the first column.
        """
        marks = {cell.mark for row in self.rows for cell in row if isinstance(cell, Marked)}
        legend = ", ".join(f"{sign} {mark}" for mark, (sign, _) in _PLAIN.items() if mark in marks)
        headers, rows, alike = list(self.headers), [list(row) for row in self.rows], []
        while width is not None and (place := _alike(headers, rows, width=width)) is not None:
            alike.append(f"{headers.pop(place)} {cell_text(rows[0][place])}")
            rows = [[*row[:place], *row[place + 1 :]] for row in rows]
        note = f"All rows: {', '.join(alike)}." if alike else ""
        below = [textwrap.fill(text, min(width or CAPTION_WIDTH, CAPTION_WIDTH)) for text in (note, self.caption)]
        blocks = [list(range(len(headers)))] if width is None else _blocks(headers, rows, width=width)
        tables = [
            text_table(
                [headers[place] for place in block], [[row[place] for place in block] for row in rows], width=width
            )
            for block in blocks
        ]
        return "\n".join(filter(None, ["\n\n".join(tables), *below, legend]))

    def markdown(self) -> str:
        """Return it in Markdown."""
        return markdown_table(self.headers, self.rows) + (f"\n\n{self.caption}" if self.caption else "")

    def latex(self) -> str:
        """Return it for LaTeX with the package booktabs."""
        return latex_table(self.headers, self.rows, caption=self.caption)

    def csv(self) -> str:
        """Return it as comma-separated values, unmarked and with all digits; deviations and ends have own columns."""
        target = io.StringIO()
        csv.writer(target, lineterminator="\n").writerows(self._plain())
        return target.getvalue().rstrip("\n")

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        headers, *rows = self._plain()
        found = [dict(zip(headers, row, strict=True)) for row in rows]
        return {"name": self.name, "caption": self.caption, "rows": found}

    def _plain(self) -> list[list[Any]]:
        """Return titles and rows for programs."""
        titles = [
            (place, key)
            for place in range(len(self.headers))
            for key in ["", *dict.fromkeys(key for row in self.rows for key in getattr(row[place], "also", ()))]
        ]
        return [
            [f"{self.headers[place]} {key}".strip() for place, key in titles],
            *([_plain_cell(row[place], key) for place, key in titles] for row in self.rows),
        ]


def _alike(headers: Sequence[str], rows: Sequence[Sequence[object]], *, width: int) -> int | None:
    """Return the first column whose cells are all equal, if the table is too wide and keeps two other columns."""
    columns = list(zip(*table_cells(headers, rows), strict=True))
    is_wide = sum(map(_longest, headers, columns)) + 2 * (len(columns) - 1) > width
    if not is_wide or len(rows) < 2 or len(columns) < 3:
        return None
    return next((place for place, cells in enumerate(columns) if len(set(cells)) == 1), None)


def _blocks(headers: Sequence[str], rows: Sequence[Sequence[object]], *, width: int) -> list[list[int]]:
    """Return which columns stand side by side: the first one, and as many of the others as fit."""
    titles, cells, _ = _layout(headers, rows, None)
    columns = list(zip(*cells, strict=True)) or [()] * len(titles)
    widths = list(map(_longest, titles, columns))
    widths[-1] = min(widths[-1], LEAST_WRAPPED)
    blocks = [[0]]
    for place in range(1, len(widths)):
        if len(blocks[-1]) > 1 and sum(widths[other] + 2 for other in blocks[-1]) + widths[place] > width:
            blocks.append([0])
        blocks[-1].append(place)
    return blocks


def _longest(title: str, cells: Sequence[str]) -> int:
    """Return the width of a column whose title may take several lines."""
    return max(map(len, [*title.split(), *cells]), default=1)


def _plain_cell(cell: object, key: str) -> object:
    if key:
        return getattr(cell, "also", {}).get(key)
    return cell.value if isinstance(cell, Marked) else cell


def number(value: float, form: str, **also: object) -> Marked:
    """Return a number that is written in this form; programs get all of its digits."""
    return Marked(value, text=format(value, form), also=also)


def span(ends: tuple[float, float], form: str) -> Marked:
    """Return an interval, with its ends in columns of their own for programs."""
    text = f"{ends[0]:{form}} to {ends[1]:{form}}"
    return Marked(text, also={"low": ends[0], "high": ends[1]})


def text_table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], *, align: str | None = None, width: int | None = None
) -> str:
    """Return a table with aligned columns for a terminal.

    Args:
        headers: one title a column.
        rows: the cells; `None` is shown as a dash, whole numbers get thousands separators, other numbers four
            significant digits. For another format, give a string.
        align: one letter a column, "l" or "r"; by default columns of numbers go right and the others left.
        width: characters of the terminal; where the table is wider, titles take several lines, and so do texts of the
            last column.

    Returns:
        The lines joined by newlines, without a newline at the end.

    Raises:
        EvaError: a row or `align` does not fit the headers.

    Example:
        >>> print(text_table(["matrix", "ranks"], [["q_proj", 480], ["down_proj", 12]]))
        matrix     ranks
        ─────────  ─────
        q_proj       480
        down_proj     12
    """
    titles, cells, align = _layout(headers, rows, align)
    heads = [titles]
    if width is not None:
        columns = list(zip(*cells, strict=True)) or [()] * len(titles)
        if sum(max(map(len, [title, *column])) + 2 for title, column in zip(titles, columns, strict=True)) - 2 > width:
            heads = _stacked(titles, list(map(_longest, titles, columns)))
        columns = list(zip(*heads, *cells, strict=True))
        cells = _wrapped(cells, width=width - sum(2 + max(map(len, column)) for column in columns[:-1]))
    widths = [max(map(len, column)) for column in zip(*heads, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        return "  ".join(_pad(*cell) for cell in zip(row, widths, align, strict=True)).rstrip()

    return "\n".join([*map(line, heads), "  ".join("─" * width for width in widths), *map(line, cells)])


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, align: str | None = None) -> str:
    """Return the same table in Markdown; see `text_table` for arguments, cells and errors.

    Example:
        >>> print(markdown_table(["matrix", "ranks"], [["q_proj", 480]]))
        | matrix | ranks |
        | ------ | ----: |
        | q_proj |   480 |
    """
    titles, cells, align = _layout(headers, rows, align, marks=_MARKDOWN, escape=_markdown)
    widths = [max(3, *map(len, column)) for column in zip(titles, *cells, strict=True)]
    ruler = ["-" * width if how == "l" else "-" * (width - 1) + ":" for width, how in zip(widths, align, strict=True)]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(_pad(*cell) for cell in zip(row, widths, align, strict=True)) + " |"

    return "\n".join([line(titles), line(ruler), *map(line, cells)])


def latex_table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], *, align: str | None = None, caption: str = ""
) -> str:
    r"""Return the same table for LaTeX with the package booktabs; see `text_table` for arguments, cells and errors.

    Example:
        >>> print(latex_table(["method", "score"], [["eva", Marked(0.5, "best")]]))
        \begin{tabular}{lr}
        \toprule
        method & score \\
        \midrule
        eva & \textbf{0.5} \\
        \bottomrule
        \end{tabular}
    """
    titles, cells, align = _layout(headers, rows, align, marks=None)
    marks = [[_LATEX.get(getattr(cell, "mark", ""), ("", "")) for cell in row] for row in rows]
    lines = [
        " & ".join(f"{before}{_latex(cell)}{after}" for cell, (before, after) in zip(row, marked, strict=True))
        for row, marked in zip(cells, marks, strict=True)
    ]
    head = " & ".join(map(_latex, titles))
    body = "".join(f"{line} \\\\\n" for line in lines)
    note = f"\n% {caption}" if caption else ""
    return (
        f"\\begin{{tabular}}{{{align}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}\\bottomrule\n\\end{{tabular}}{note}"
    )


def _markdown(text: str) -> str:
    return re.sub(r"[|*<`\\]", r"\\\g<0>", text)


def _latex(text: str) -> str:
    text = re.sub(r"(?<!\w)-(?=\.?\d)", "−", text)
    return "".join(_SPECIAL.get(sign, sign) for sign in text)


def bar(value: float, largest: float, *, width: int = 20) -> str:
    """Return a horizontal bar of `width` characters at most, in steps of an eighth of a character.

    Args:
        value: what the bar shows; negative and undefined values give an empty bar.
        largest: the value of a full bar.
        width: characters of a full bar.

    Returns:
        The bar, without trailing spaces.

    Example:
        >>> bar(3, 4, width=2)
        '█▌'
    """
    if not (largest > 0 and value > 0 and math.isfinite(value)):
        return ""
    full, eighths = divmod(round(8 * width * min(1.0, value / largest)), 8)
    return (_BLOCKS[8] * full + _BLOCKS[eighths]).rstrip()


_PLAIN = {"best": ("*", ""), "second": ("'", "")}
_MARKDOWN = {"best": ("**", "**"), "second": ("<u>", "</u>")}
_LATEX = {"best": (r"\textbf{", "}"), "second": (r"\underline{", "}")}


def cell_text(value: object) -> str:
    """Return how a cell is shown, without its mark: see `text_table`."""
    if isinstance(value, Marked):
        value = value.text or value.value
    if value is None:
        return _MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 or not math.isfinite(value) else f"{value:,.0f}"
    return " ".join(str(value).split())


def table_cells(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> list[list[str]]:
    """Return the cells of a table as text.

    Raises:
        EvaError: there are no headers, or a row does not fit them.
    """
    if not headers:
        raise EvaError("a table needs at least one column; headers is empty.")
    for number, row in enumerate(rows):
        if len(row) != len(headers):
            raise EvaError(f"row {number} of the table has {len(row)} cells, the header has {len(headers)}: {row!r}.")
    return [[cell_text(cell) for cell in row] for row in rows]


def alignment(headers: Sequence[str], cells: Sequence[Sequence[str]], align: str | None = None) -> str:
    """Return one letter a column: "r" where every cell that is not missing is a number, otherwise "l"."""
    if align is None:
        columns = list(zip(*cells, strict=True)) or [()] * len(headers)
        filled = [[cell for cell in column if cell and cell != _MISSING] for column in columns]
        align = "".join("r" if column and all(map(_NUMBER.match, column)) else "l" for column in filled)
    if len(align) != len(headers) or set(align) - set("lr"):
        raise EvaError(f"align is {align!r} for {len(headers)} columns; give one letter a column, 'l' or 'r'.")
    return align


def _layout(
    headers: Sequence[str],
    rows: Sequence[Sequence[object]],
    align: str | None,
    marks: dict[str, tuple[str, str]] | None = _PLAIN,
    escape: Callable[[str], str] = str,
) -> tuple[list[str], list[list[str]], str]:
    """Return titles, cells as text with their marks, and the alignment."""
    cells = table_cells(headers, rows)
    align = alignment(headers, cells, align)
    cells = [list(map(escape, row)) for row in cells]
    if marks:
        for row, shown in zip(rows, cells, strict=True):
            for column, cell in enumerate(row):
                if isinstance(cell, Marked) and cell.mark:
                    before, after = marks[cell.mark]
                    shown[column] = before + shown[column] + after if after else shown[column] + before
    return [escape(cell_text(title)) for title in headers], cells, align


def _stacked(titles: Sequence[str], widths: Sequence[int]) -> list[list[str]]:
    """Return titles in as many lines as they need to be so wide, the last lines of all side by side."""
    lines = [textwrap.wrap(title, width) or [""] for title, width in zip(titles, widths, strict=True)]
    height = max(map(len, lines))
    return [list(line) for line in zip(*([""] * (height - len(own)) + own for own in lines), strict=True)]


def _wrapped(cells: Sequence[Sequence[str]], *, width: int) -> list[list[str]]:
    """Return rows whose last cells are at most `width` wide, or so; further lines of a cell are rows too."""
    wrapped = []
    for *first, last in cells:
        lines = textwrap.wrap(last, max(width, LEAST_WRAPPED)) or [""]
        wrapped += [[*(first if number == 0 else [""] * len(first)), line] for number, line in enumerate(lines)]
    return wrapped


def _pad(cell: str, width: int, how: str) -> str:
    return cell.rjust(width) if how == "r" else cell.ljust(width)


def byte_size(n_bytes: float) -> str:
    """Return a number of bytes for people: `12 MiB`, `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if n_bytes >= 10 or unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"


def duration(seconds: float) -> str:
    """Return a time for people: `45 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds >= 7200:
        return f"{round(seconds) // 3600} h {round(seconds) % 3600 // 60:02d} min"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
