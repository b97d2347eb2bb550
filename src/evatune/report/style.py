"""How figures look, in one place, and how they are written to files."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evatune.errors import EvaError
from evatune.files import write_bytes

__all__ = ["FORMATS", "check_format", "colours", "fresh_axes", "looks", "render", "save", "styled"]

FORMATS = ("svg", "png", "pdf")
INK, MUTED, GRID, EMPTY = "#22272e", "#5b6470", "#d9dde3", "#eceef1"

# Okabe and Ito's palette stays distinct under every common kind of colour blindness; its yellow is too pale for lines.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#22272e")
_METHODS = {"eva": "#d55e00", "lora": "#0072b2", "pissa": "#009e73", "dora": "#cc79a7", "olora": "#e69f00"}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same picture
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "svg.hashsalt": "evatune",  # the same figure gives the same file
}

P = ParamSpec("P")


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(STYLE):
        yield


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Let a drawing function run with our style, and leave the caller's settings of matplotlib as they were."""

    @wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with _style():
            return draw(*args, **kwargs)

    return inner


def fresh_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of this size in inches with one axes, without a window and outside matplotlib's global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def colours(labels: Iterable[str]) -> dict[str, str]:
    """Give each label a colour: a fixed one for each method of the paper, else the next one of the palette."""
    labels = list(labels)
    own = {label: _METHODS[label.lower()] for label in labels if label.lower() in _METHODS}
    free = [colour for colour in PALETTE if colour not in own.values()]
    rest = (label for label in labels if label not in own)
    return own | {label: free[number % len(free)] for number, label in enumerate(rest)}


def looks(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Give each run a colour and a dash of its own: runs whose labels begin with the same word share the colour."""
    labels = list(labels)
    first = {label: (label.split() or [""])[0] for label in labels}
    colour = colours(dict.fromkeys(first.values()))
    before: Counter[str] = Counter()
    chosen = {}
    for label in labels:
        own = colour[first[label]]
        chosen[label] = {"color": own, "linestyle": _DASHES[before[own] % len(_DASHES)]}
        before[own] += 1
    return chosen


def render(figure: Figure, kind: str = "svg") -> bytes:
    """Return a figure as the bytes of a file of this kind, the same bytes for the same figure."""
    buffer = io.BytesIO()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with _style():
        figure.savefig(buffer, format=kind, metadata=undated)
    return _rounded(buffer.getvalue()) if kind == "svg" else buffer.getvalue()


def _rounded(svg: bytes) -> bytes:
    """Return a figure whose curves have places to a hundredth of a point, which makes its file smaller."""
    return re.sub(rb' d="[^"]*"', lambda found: re.sub(rb"(\.\d\d)\d+", rb"\1", found[0]), svg)


def check_format(path: str | Path) -> str:
    """Return the format that a figure is written in, by the ending of its name.

    Raises:
        EvaError: it is none of `FORMATS`.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise EvaError(f"a figure cannot be written as {Path(path).name!r}; end its name with .{', .'.join(FORMATS)}.")
    return kind


def save(figure: Figure, path: str | Path | None) -> Figure:
    """Write a figure to `path`, if there is one; the suffix says in which format.

    Args:
        figure: the figure.
        path: where to write it; a file that exists is replaced when the new one is complete.

    Returns:
        The figure.

    Raises:
        EvaError: the suffix is none of `FORMATS`.
    """
    if path is None:
        return figure
    path = Path(path).expanduser()
    kind = check_format(path)
    write_bytes(path, render(figure, kind))
    return figure
