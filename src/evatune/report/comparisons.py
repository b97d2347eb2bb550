"""The figures of a comparison: curves with bands, a Pareto front, critical differences, bars, matrices of similarity.

Each function returns a `matplotlib.figure.Figure` without a window, and writes it to `path` if one is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from evatune.errors import EvaError
from evatune.report.style import INK, MUTED, PALETTE, fresh_axes, looks, save, styled

__all__ = ["Band", "bands", "bars", "critical_difference", "matrix", "pareto"]

Band = tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]
"""Places, middle values, lower ends and upper ends of a curve."""


@styled
def bands(
    curves: Mapping[str, Band],
    *,
    x: str,
    y: str,
    title: str,
    log_x: bool = False,
    log_y: bool = False,
    path: str | Path | None = None,
) -> Figure:
    """Draw a curve with a band for each label; curves of few points have markers.

    Args:
        curves: by label.
        x: what the places are.
        y: what the values are.
        title: of the figure.
        log_x: logarithmic places, with a tick at each of them if they are few.
        log_y: logarithmic values.
        path: where to write the figure, as .svg, .png or .pdf.

    Raises:
        EvaError: there is no curve, or the suffix of `path` is unknown.
    """
    if not curves:
        raise EvaError(f"there is nothing to draw: no {y} over {x}.")
    figure, axes = fresh_axes(7.2, 4.2)
    for label, look in looks(curves).items():
        places, values, lows, highs = (np.asarray(part, dtype=float) for part in curves[label])
        axes.fill_between(places, lows, highs, color=look["color"], alpha=0.12, linewidth=0)
        axes.plot(places, values, label=label, marker="o" if len(places) < 12 else None, markersize=4, **look)
    ticks = sorted({float(place) for places, *_ in curves.values() for place in places})
    if log_x:
        axes.set_xscale("log")
        if len(ticks) < 12:
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
    figure, axes = fresh_axes(7.2, 4.6)
    for label, look in looks(points).items():
        cost, score, half = points[label]
        axes.errorbar(cost, score, yerr=half or None, marker="o", capsize=3, linestyle="none", color=look["color"])
        axes.annotate(label, (cost, score), textcoords="offset points", xytext=(6, 4), fontsize=8)
    front = pareto_front(points, higher_is_better=higher_is_better)
    places = [points[label][:2] for label in front]
    axes.step(*zip(*places, strict=True), where="post", color=MUTED, linestyle="--", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    return save(figure, path)


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
        axes.annotate(f"{label}  {ranks[label]:.2f}", (ranks[label], y), xytext=(4, 0), textcoords="offset points")
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
def bars(values: Mapping[str, float], *, x: str, title: str, path: str | Path | None = None) -> Figure:
    """Draw one horizontal bar with its number for each label.

    Raises:
        EvaError: there are none, or the suffix of `path` is unknown.
    """
    if not values:
        raise EvaError(f"there is nothing to draw: no {x}.")
    figure, axes = fresh_axes(7.2, 1.1 + 0.3 * len(values))
    places = np.arange(len(values))
    axes.barh(places, list(values.values()), height=0.62, color=PALETTE[0], alpha=0.85)
    for place, value in zip(places, values.values(), strict=True):
        axes.annotate(
            f"{value:.3g}", (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(places, list(values))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlabel(x)
    axes.set_title(title)
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


def _legend(figure: Figure, n: int) -> None:
    figure.legend(loc="outside lower center", ncols=min(4, max(1, n)))
