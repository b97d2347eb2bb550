"""Tables and bars as text: for terminals and logs, Markdown, LaTeX and spreadsheets."""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evatune.errors import EvaError

__all__ = ["Marked", "Table", "bar", "byte_size", "duration", "latex_table", "markdown_table", "text_table"]

_NUMBER = re.compile(r"[-+−±~<>]?\.?\d|nan$|[-+−]?inf$")
_MISSING = "–"
CAPTION_WIDTH = 100
"""Characters of a line of a caption in a terminal."""
_BLOCKS = " ▏▎▍▌▋▊▉█"
_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
_SPECIAL |= {"±": r"$\pm$", "ρ": r"$\rho$", "α": r"$\alpha$", "–": "--", "−": "$-$", "Δ": r"$\Delta$", "×": r"$\times$"}


@dataclass(frozen=True)
class Marked:
    """A cell that stands out among those that it is compared with."""

    value: object
    """What the cell shows."""
    mark: Literal["", "best", "second"] = ""
    """Bold and underlined where that is possible; a star and an apostrophe in plain text."""
    href: str = ""
    """Where the cell leads on a page."""


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

    def text(self) -> str:
        """Return it for a terminal."""
        marks = {cell.mark for row in self.rows for cell in row if isinstance(cell, Marked)}
        legend = ", ".join(f"{sign} {mark}" for mark, (sign, _) in _PLAIN.items() if mark in marks)
        caption = textwrap.fill(self.caption, CAPTION_WIDTH)
        return "\n".join(filter(None, [text_table(self.headers, self.rows), caption, legend]))

    def markdown(self) -> str:
        """Return it in Markdown."""
        return markdown_table(self.headers, self.rows) + (f"\n\n{self.caption}" if self.caption else "")

    def latex(self) -> str:
        """Return it for LaTeX with the package booktabs."""
        return latex_table(self.headers, self.rows, caption=self.caption)

    def csv(self) -> str:
        """Return it as comma-separated values, unmarked and with all digits."""
        target = io.StringIO()
        csv.writer(target, lineterminator="\n").writerows([self.headers, *map(_plain_row, self.rows)])
        return target.getvalue().rstrip("\n")

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        rows = [dict(zip(self.headers, _plain_row(row), strict=True)) for row in self.rows]
        return {"name": self.name, "caption": self.caption, "rows": rows}


def _plain_row(row: Sequence[object]) -> list[object]:
    return [cell.value if isinstance(cell, Marked) else cell for cell in row]


def text_table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], *, align: str | None = None, width: int | None = None
) -> str:
    """Return a table with aligned columns for a terminal.

    Args:
        headers: one title a column.
        rows: the cells; `None` is shown as a dash, whole numbers get thousands separators, other numbers four
            significant digits. For another format, give a string.
        align: one letter a column, "l" or "r"; by default columns of numbers go right and the others left.
        width: characters of the terminal; texts of the last column go on in further lines where they are longer.

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
    if width is not None:
        columns = list(zip(titles, *cells, strict=True))
        cells = _wrapped(cells, width=width - sum(2 + max(map(len, column)) for column in columns[:-1]))
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        return "  ".join(_pad(*cell) for cell in zip(row, widths, align, strict=True)).rstrip()

    return "\n".join([line(titles), "  ".join("─" * width for width in widths), *map(line, cells)])


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, align: str | None = None) -> str:
    """Return the same table in Markdown; see `text_table` for arguments, cells and errors.

    Example:
        >>> print(markdown_table(["matrix", "ranks"], [["q_proj", 480]]))
        | matrix | ranks |
        | ------ | ----: |
        | q_proj |   480 |
    """
    titles, cells, align = _layout(headers, rows, align, marks=_MARKDOWN)
    titles, *cells = [[cell.replace("|", "\\|") for cell in row] for row in [titles, *cells]]
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


def _latex(text: str) -> str:
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
        value = value.value
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
) -> tuple[list[str], list[list[str]], str]:
    """Return titles, cells as text with their marks, and the alignment."""
    cells = table_cells(headers, rows)
    align = alignment(headers, cells, align)
    if marks:
        for row, shown in zip(rows, cells, strict=True):
            for column, cell in enumerate(row):
                if isinstance(cell, Marked) and cell.mark:
                    before, after = marks[cell.mark]
                    shown[column] = before + shown[column] + after if after else shown[column] + before
    return [cell_text(title) for title in headers], cells, align


def _wrapped(cells: Sequence[Sequence[str]], *, width: int) -> list[list[str]]:
    """Return rows whose last cells are at most `width` wide, at least 20; further lines of a cell are rows too."""
    wrapped = []
    for *first, last in cells:
        lines = textwrap.wrap(last, max(width, 20)) or [""]
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
