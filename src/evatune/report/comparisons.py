"""The figures of a comparison: curves with bands, a Pareto front, critical differences, bars, matrices of similarity.

Each function returns a `matplotlib.figure.Figure` without a window, and writes it to `path` if one is given.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, PercentFormatter

from evatune.errors import EvaError
from evatune.report.style import GRID, INK, MUTED, PALETTE, fresh_axes, looks, save, styled

__all__ = ["Band", "bands", "bars", "critical_difference", "intervals", "matrix", "pareto"]

Band = tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]
"""Places, middle values, lower ends and upper ends of a curve."""
WIDE_RANGE = 100
"""Largest over smallest value beyond which bars hide the small ones; then they are points on a logarithmic axis."""
MOST_IN_ONE, PANELS_IN_ROW = 6, 4
"""Curves that are told apart in one panel; panels side by side."""
LABEL_WIDTH, LABEL_GAP = 0.9, 0.15
"""Inches that a label of a point takes."""
LEADER = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 3}
"""The line from a label to its point."""
PAPER: Any = {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.8}}
"""Text that lines do not cross."""


@styled
def bands(
    curves: Mapping[str, Band],
    *,
    x: str,
    y: str,
    title: str,
    log_x: bool = False,
    log_y: bool = False,
    tick_places: bool = False,
    against: str | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw a curve with a band for each label; curves of few points have markers.

    More than six curves get a panel each, in which the others are grey and the one to compare with is dashed.

    Args:
        curves: by label.
        x: what the places are.
        y: what the values are.
        title: of the figure.
        log_x: logarithmic places.
        log_y: logarithmic values.
        tick_places: put a tick at each place if they are few, and nowhere else.
        against: label of the curve that each panel shows beside its own; by default the first one.
        path: where to write the figure, as .svg, .png or .pdf.

    Raises:
        EvaError: there is no curve, or the suffix of `path` is unknown.
    """
    if not curves:
        raise EvaError(f"there is nothing to draw: no {y} over {x}.")
    if len(curves) > MOST_IN_ONE:
        return save(_panels(curves, x=x, y=y, title=title, log=(log_x, log_y), against=against), path)
    figure, axes = fresh_axes(7.2, 4.2)
    for label, look in looks(curves).items():
        _curve(axes, curves[label], label=label, **look)
    ticks = sorted({float(place) for places, *_ in curves.values() for place in places})
    if log_x:
        axes.set_xscale("log")
    if tick_places and len(ticks) < 12:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
    if log_y:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    _legend(figure, len(curves))
    return save(figure, path)


@styled
def pareto(
    points: Mapping[str, tuple[float, float, float]],
    *,
    x: str,
    y: str,
    title: str,
    higher_is_better: bool = True,
    path: str | Path | None = None,
) -> Figure:
    """Draw scores over costs, and the front of those that no other beats at a lower cost.

    Args:
        points: cost, score and half the length of its bar, by label.
        x: what the costs are.
        y: what the scores are.
        title: of the figure.
        higher_is_better: of the scores; of the costs, less is.
        path: where to write the figure, as .svg, .png or .pdf.

    Raises:
        EvaError: there is no point, or the suffix of `path` is unknown.
    """
    if not points:
        raise EvaError("no method has both a score and a number of parameters; nothing to draw.")
    figure, axes = fresh_axes(7.2, max(4.6, 1.2 + 1.1 * LABEL_GAP * len(points)))
    for label, look in looks(points).items():
        cost, score, half = points[label]
        bar = {"elinewidth": 1, "capsize": 2, "linestyle": "none", "color": look["color"]}
        axes.errorbar(cost, score, yerr=half or None, marker="o", markersize=5, **bar)
    front = pareto_front(points, higher_is_better=higher_is_better)
    places = [points[label][:2] for label in front]
    axes.step(*zip(*places, strict=True), where="post", color=MUTED, linestyle="--", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    _name_points(figure, axes, {label: points[label][:2] for label in points})
    return save(figure, path)


def _name_points(figure: Figure, axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write labels to the right of their points; where points are close, the labels stand in a column with lines."""
    axes.margins(x=0.16)
    figure.draw_without_rendering()  # which places the axes
    inches = axes.transData.transform(np.array(list(points.values()))) / figure.dpi
    left = list(np.argsort(inches[:, 0]))
    labels = list(points)
    low, high = (axes.bbox.y0 / figure.dpi + LABEL_GAP / 2, axes.bbox.y1 / figure.dpi - LABEL_GAP / 2)
    while left:
        column = [left.pop(0)]
        while left and inches[left[0], 0] - inches[column[-1], 0] < 0.15 + LABEL_WIDTH:  # labels would cover it
            column.append(left.pop(0))
        place = inches[column[-1], 0] + 0.15
        heights = spread([float(inches[index, 1]) for index in column], gap=LABEL_GAP)
        moved_by = max(0.0, low - min(heights)) - max(0.0, max(heights) - high)
        heights = [height + moved_by for height in heights]
        for index, height in zip(column, heights, strict=True):
            moved = abs(height - inches[index, 1]) > 0.03 or place - inches[index, 0] > 0.2
            axes.annotate(
                labels[index],
                points[labels[index]],
                xytext=((place - inches[index, 0]) * 72, (height - inches[index, 1]) * 72),
                textcoords="offset points",
                va="center",
                fontsize=8,
                arrowprops=LEADER if moved else None,
            )


def spread(values: Sequence[float], *, gap: float) -> list[float]:
    """Return values near the given ones, in the same order, of which each two are this far apart at least."""
    order = np.argsort(values, kind="stable")
    steps = gap * np.arange(len(values))
    blocks: list[list[float]] = []  # of values less their steps: where these fall, neighbours take their mean
    for value in np.asarray(values, dtype=float)[order] - steps:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    found = np.concatenate([[float(np.mean(block))] * len(block) for block in blocks] or [[]]) + steps
    back = np.empty_like(found)
    back[order] = found
    return [float(value) for value in back]


def pareto_front(points: Mapping[str, Sequence[float]], *, higher_is_better: bool = True) -> list[str]:
    """Return the labels of the points (cost, score) that no other beats at the same or a lower cost, by rising cost."""
    sign = 1 if higher_is_better else -1
    front: list[str] = []
    for label in sorted(points, key=lambda label: (points[label][0], -sign * points[label][1])):
        if not front or sign * points[label][1] > sign * points[front[-1]][1]:
            front.append(label)
    return front


@styled
def critical_difference(ranks: Mapping[str, float], distance: float, *, path: str | Path | None = None) -> Figure:
    """Draw mean ranks on a line; a bar joins methods that cannot be told apart (Demšar, 2006).

    Args:
        ranks: mean rank by method, 1 is best.
        distance: the critical difference.
        path: where to write the figure, as .svg, .png or .pdf.

    Raises:
        EvaError: there are less than two methods, or the suffix of `path` is unknown.
    """
    if len(ranks) < 2:
        raise EvaError("a diagram of ranks needs two methods at least.")
    order = sorted(ranks, key=lambda label: ranks[label])
    bars_ = alike(ranks, distance)
    figure, axes = fresh_axes(7.2, 1.4 + 0.24 * len(order) + 0.12 * len(bars_))
    top = 1.0 + 0.25 * len(bars_)
    for number, label in enumerate(order):
        y = -number - 0.6
        axes.plot([ranks[label], ranks[label]], [top, y], color=MUTED, linewidth=0.8)
        axes.annotate(
            f"{label}  {ranks[label]:.2f}", (ranks[label], y), xytext=(4, 0), textcoords="offset points", **PAPER
        )
    for number, (first, last) in enumerate(bars_):
        y = top - 0.35 - 0.35 * number
        axes.plot([ranks[first] - 0.03, ranks[last] + 0.03], [y, y], color=INK, linewidth=4, solid_capstyle="butt")
    axes.plot([1, 1 + distance], [top + 0.7, top + 0.7], color=PALETTE[1], linewidth=2)
    axes.annotate(f"critical difference {distance:.2f}", (1, top + 0.9), color=PALETTE[1], fontsize=8)
    axes.set_xlim(0.9, max(len(order), 1 + distance) + 0.9)
    axes.set_ylim(-len(order) - 0.4, top + 1.8)
    axes.get_yaxis().set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    axes.set_xlabel("mean rank (1 is best); a bar joins methods that cannot be told apart")
    return save(figure, path)


def alike(ranks: Mapping[str, float], distance: float) -> list[tuple[str, str]]:
    """Return the first and the last method of each longest group whose mean ranks differ by less than a distance."""
    order = sorted(ranks, key=lambda label: ranks[label])
    groups: list[tuple[int, int]] = []
    for start, first in enumerate(order):
        end = max(index for index, label in enumerate(order) if ranks[label] - ranks[first] < distance)
        if end > start and (not groups or end > groups[-1][1]):
            groups.append((start, end))
    return [(order[start], order[end]) for start, end in groups]


@styled
def bars(
    values: Mapping[str, float], *, x: str, title: str, form: str = ".3g", path: str | Path | None = None
) -> Figure:
    """Draw one horizontal bar with its number, formatted by `form`, for each label.

    Positive values of very different size are points on a logarithmic axis.

    Raises:
        EvaError: there are none, or the suffix of `path` is unknown.
    """
    if not values:
        raise EvaError(f"there is nothing to draw: no {x}.")
    figure, axes = fresh_axes(7.2, 1.1 + 0.3 * len(values))
    places = np.arange(len(values))
    if min(values.values()) > 0 and max(values.values()) > WIDE_RANGE * min(values.values()):
        axes.set_xscale("log")
        axes.plot(list(values.values()), places, linestyle="none", marker="o", color=PALETTE[0])
    else:
        axes.barh(places, list(values.values()), height=0.62, color=PALETTE[0], alpha=0.85)
    for place, value in zip(places, values.values(), strict=True):
        axes.annotate(
            f"{value:{form}}", (value, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(places, list(values))
    axes.grid(False, axis="y")
    if form.endswith("%"):
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(x=0.12)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlabel(x)
    axes.set_title(title)
    return save(figure, path)


@styled
def intervals(
    values: Mapping[str, tuple[float, ...]],
    *,
    x: str,
    title: str,
    zero: str,
    strong: Collection[str] = (),
    path: str | Path | None = None,
) -> Figure:
    """Draw a point with its interval for each label, from top to bottom, beside a line at 0.

    Args:
        values: middle, lower and upper end by label.
        x: what the values are.
        title: of the figure.
        zero: what the line at 0 stands for.
        strong: labels whose intervals are in colour, the others are grey.
        path: where to write the figure, as .svg, .png or .pdf.

    Raises:
        EvaError: there are none, or the suffix of `path` is unknown.
    """
    if not values:
        raise EvaError(f"there is nothing to draw: no {x}.")
    figure, axes = fresh_axes(7.2, 1.2 + 0.22 * len(values))
    axes.axvline(0, color=INK, linestyle="--", linewidth=1)
    axes.annotate(
        zero, (0, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points", ha="center"
    )
    for place, (label, (middle, low, high)) in enumerate(values.items()):
        color = PALETTE[0] if label in strong else MUTED
        axes.plot([low, high], [place, place], color=color, linewidth=2, solid_capstyle="butt", alpha=0.6)
        axes.plot(middle, place, marker="o", markersize=5, color=color)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_formatter("{x:+.3g}")
    axes.set_xlabel(x)
    axes.set_title(title, pad=16)
    return save(figure, path)


@styled
def matrix(
    values: np.ndarray, labels: Sequence[str], *, title: str, name: str, path: str | Path | None = None
) -> Figure:
    """Draw a square matrix of similarities between 0 and 1 with its numbers.

    Args:
        values: (n, n).
        labels: n names.
        title: of the figure.
        name: what a number is.
        path: where to write the figure, as .svg, .png or .pdf.
    """
    n = len(labels)
    figure, axes = fresh_axes(2.6 + 0.7 * n, 1.8 + 0.6 * n)
    image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis")
    for row in range(n):
        for column in range(n):
            ink = "white" if values[row, column] < 0.6 else "black"
            axes.text(column, row, f"{values[row, column]:.3f}", ha="center", va="center", color=ink, fontsize=8)
    axes.set_xticks(range(n), list(labels), rotation=30, ha="right")
    axes.set_yticks(range(n), list(labels))
    axes.grid(False)
    axes.set_title(title)
    figure.colorbar(image, label=name, shrink=0.8)
    return save(figure, path)


def _panels(
    curves: Mapping[str, Band], *, x: str, y: str, title: str, log: tuple[bool, bool], against: str | None
) -> Figure:
    """Return a figure with a panel for each curve."""
    n_rows = -(-len(curves) // PANELS_IN_ROW)
    figure = Figure(figsize=(7.2, 0.9 + 1.35 * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, PANELS_IN_ROW, sharex=True, sharey=True, squeeze=False).ravel()
    shared = against if against is not None and against in curves else next(iter(curves))
    look = looks(curves)
    for axes, label in zip(panels, curves, strict=False):
        others = [curves[other][:2] for other in curves if other not in (label, shared)]
        if others:  # one line with gaps, since a file with a line for each in each panel is large
            places, values = (
                np.concatenate([[*part, np.nan] for part in parts]) for parts in zip(*others, strict=True)
            )
            axes.plot(places, values, color=GRID, linewidth=0.8, zorder=1)
        if label != shared:
            axes.plot(*curves[shared][:2], color=MUTED, linestyle="--", linewidth=1)
        _curve(axes, curves[label], color=look[label]["color"])
        axes.set_title(label, fontsize=9, pad=3)
        axes.set_xscale("log" if log[0] else "linear")
        axes.set_yscale("log" if log[1] else "linear")
        if log[0]:
            axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(labelsize=7.5)
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(curves) - PANELS_IN_ROW) : len(curves)]:
        axes.tick_params(labelbottom=True)
    figure.suptitle(f"{title} (dashed: {shared}, grey: all others)", x=0.01, ha="left", fontsize=10, weight="bold")
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    return figure


def _curve(axes: Axes, band: Band, **look: Any) -> None:
    places, values, lows, highs = (np.asarray(part, dtype=float) for part in band)
    axes.fill_between(places, lows, highs, color=look["color"], alpha=0.12, linewidth=0)
    axes.plot(places, values, marker="o" if len(places) < 12 else None, markersize=4, **look)


def _legend(figure: Figure, n: int) -> None:
    figure.legend(loc="outside lower center", ncols=min(4, max(1, n)))
