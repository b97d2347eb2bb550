"""The figures: rank heat maps, explained-variance curves, curves of loss, gradient norm and score over the rate.

Each function returns a `matplotlib.figure.Figure` without a window, and writes it to `path` if one is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from evatune.errors import EvaError
from evatune.report.grid import Grid, grid, locate
from evatune.report.style import EMPTY, INK, PALETTE, colours, fresh_axes, looks, save, styled

if TYPE_CHECKING:
    from evatune.allocation import RankPlan
    from evatune.spectra import Spectra

__all__ = [
    "explained_variance_curves",
    "gradient_norms",
    "loss_curves",
    "rank_heatmap",
    "rank_maps",
    "ranks_by_matrix",
    "rate_curves",
]

Log = Sequence[Mapping[str, Any]]


@styled
def rank_heatmap(plan: RankPlan, *, path: str | Path | None = None) -> Figure:
    """Draw the ranks of a plan, and their changes against uniform ranks, as layers × matrices.

    This is Figures 12 and 13 of the paper side by side. Targets outside any numbered layer have rows of their own, and
    a layer without some matrix is left blank there. Experts of one layer share a cell, which shows their mean.

    Args:
        plan: the plan.
        path: where to write the figure, as .svg, .png or .pdf.

    Returns:
        The figure.

    Raises:
        EvaError: the plan has no targets, or the suffix of `path` is unknown.
    """
    if not plan.ranks:
        raise EvaError("the plan has no targets, so there is nothing to draw.")
    ranks = grid(plan.ranks)
    deltas = grid({name: rank - plan.base_ranks[name] for name, rank in plan.ranks.items()})
    bases = sorted(set(plan.base_ranks.values()))
    uniform = f"r = {bases[0]}" if len(bases) == 1 else f"r = {bases[0]} to {bases[-1]}"

    n_rows, n_columns = ranks.values.shape
    cell_height = float(np.clip(7.8 / n_rows, 0.115, 0.27))
    cell_width = float(np.clip(6.0 / n_columns, 0.34, 0.56))
    width, height = 2 * n_columns * cell_width + 1.5, n_rows * cell_height + 2.2
    figure = Figure(figsize=(max(width, 6.0), height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    annotate = cell_height >= 0.17

    highest = max(1, int(np.nanmax(ranks.values)))
    _heatmap(left, ranks, limits=(0, highest), cmap="viridis", sign="", annotate=annotate)
    left.set_title(f"Rank, ρ = {plan.rho:g}")
    furthest = max(1.0, float(np.nanmax(np.abs(deltas.values))))
    _heatmap(right, deltas, limits=(-furthest, furthest), cmap="RdBu_r", sign="+", annotate=annotate)
    right.set_title(f"Change from {uniform}")
    right.tick_params(labelleft=False)

    # Leave out some numbers of layers if they would overlap; rows with names keep their labels.
    step = 1 if cell_height >= 0.14 else 2
    shown = [i for i, row in enumerate(ranks.rows) if not row.isdecimal() or int(row) % step == 0]
    left.set_yticks(shown, [ranks.rows[i] for i in shown], fontsize=7.5 if cell_height >= 0.14 else 6.5)
    left.set_ylabel("layer")
    return save(figure, path)


@styled
def rank_maps(plans: Sequence[RankPlan], *, path: str | Path | None = None) -> Figure:
    """Draw the ranks of several plans above their changes against uniform ranks (Figures 7 to 10 of the paper).

    Args:
        plans: of one model, for example for several values of rho.
        path: where to write the figure, as .svg, .png or .pdf.

    Raises:
        EvaError: there is no plan, or the suffix of `path` is unknown.
    """
    if not plans or not all(plan.ranks for plan in plans):
        raise EvaError("there is no plan with targets, so there is nothing to draw.")
    ranks = [grid(plan.ranks) for plan in plans]
    deltas = [grid({name: rank - plan.base_ranks[name] for name, rank in plan.ranks.items()}) for plan in plans]
    n_rows, n_columns = ranks[0].values.shape
    figure = Figure(
        figsize=(1.2 + len(plans) * (0.8 + 0.42 * n_columns), 2.2 + 2 * max(1.6, 0.2 * n_rows)), layout="constrained"
    )
    axes = figure.subplots(2, len(plans), squeeze=False)
    most = max(float(np.nanmax(cells.values)) for cells in ranks)
    reach = max(1.0, max(float(np.nanmax(np.abs(cells.values))) for cells in deltas))
    annotate = n_rows * n_columns * len(plans) <= 300
    for column, plan in enumerate(plans):
        _heatmap(axes[0, column], ranks[column], limits=(0, most), cmap="viridis", sign="", annotate=annotate)
        _heatmap(axes[1, column], deltas[column], limits=(-reach, reach), cmap="RdBu_r", sign="+", annotate=annotate)
        axes[0, column].set_title(f"rank, ρ = {plan.rho:g}")
        axes[1, column].set_title(f"change, ρ = {plan.rho:g}")
    shown = range(0, n_rows, max(1, n_rows // 20))
    for axis in axes.flat:
        axis.set_yticks(shown, [ranks[0].rows[index] for index in shown], fontsize=7)
    return save(figure, path)


def _heatmap(axes: Axes, cells: Grid, *, limits: tuple[float, float], cmap: str, sign: str, annotate: bool) -> None:
    """Draw one panel with its colour bar."""
    norm = Normalize(*limits)
    image = axes.imshow(np.ma.masked_invalid(cells.values), cmap=cmap, norm=norm, aspect="auto", interpolation="none")
    axes.set_facecolor(EMPTY)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    titles = [
        column + (f" (mean of {most})" if most > 1 else "")
        for column, most in zip(cells.columns, cells.counts.max(axis=0), strict=True)
    ]
    axes.set_xticks(range(len(titles)), titles, rotation=45, ha="left", rotation_mode="anchor", fontsize=8)
    axes.xaxis.tick_top()
    # White lines between the cells, wider ones between stacks of layers.
    for edges, line in ((np.arange(1, len(cells.rows)), axes.axhline), (np.arange(1, len(titles)), axes.axvline)):
        for edge in edges:
            line(edge - 0.5, color="white", linewidth=2.5 if line == axes.axhline and edge in cells.breaks else 0.6)
    if annotate:
        for (row, column), value in np.ndenumerate(cells.values):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                text = f"{value:{sign}.0f}".replace("-", "−") if round(value) else "0"
                ink = "white" if dark else INK
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=ink)
    bar = axes.figure.colorbar(
        image, ax=axes, orientation="horizontal", pad=0.015, aspect=30, ticks=MaxNLocator(6, integer=True)
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5, length=2)
    bar.set_label("components" if not sign else "components more or fewer", fontsize=8)


@styled
def ranks_by_matrix(plan: RankPlan, *, path: str | Path | None = None) -> Figure:
    """Draw the mean rank of each kind of matrix, with its least and largest rank as a thin line.

    Args:
        plan: the plan.
        path: where to write the figure, as .svg, .png or .pdf.

    Returns:
        The figure.

    Raises:
        EvaError: the plan has no targets, or the suffix of `path` is unknown.
    """
    if not plan.ranks:
        raise EvaError("the plan has no targets, so there is nothing to draw.")
    kinds: dict[str, list[int]] = {}
    for name, place in locate(plan.ranks).items():
        kinds.setdefault(place.column, []).append(plan.ranks[name])
    figure, axes = fresh_axes(6.4, 1.1 + 0.32 * len(kinds))
    places = np.arange(len(kinds))
    means = [float(np.mean(ranks)) for ranks in kinds.values()]
    axes.barh(places, means, height=0.62, color=PALETTE[0], alpha=0.85)
    axes.hlines(places, list(map(min, kinds.values())), list(map(max, kinds.values())), color=INK, linewidth=1)
    for y, mean, ranks in zip(places, means, kinds.values(), strict=True):
        axes.text(max(ranks) + 0.3, float(y), f"{mean:.1f}", va="center", fontsize=8)
    uniform = float(np.mean(list(plan.base_ranks.values())))
    axes.axvline(uniform, color=PALETTE[1], linestyle="--", linewidth=1.2)
    axes.text(uniform, -0.75, f"uniform {uniform:g}", color=PALETTE[1], ha="center", va="bottom", fontsize=8)
    axes.set_yticks(places, list(kinds))
    axes.set_ylim(len(kinds) - 0.5, -0.8)
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.06 * max(*map(max, kinds.values()), uniform) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("rank: mean over layers (bar), least to largest (line)")
    axes.set_title(f"Mean rank by matrix, ρ = {plan.rho:g}", pad=14)
    return save(figure, path)


@styled
def explained_variance_curves(spectra: Spectra, *, path: str | Path | None = None) -> Figure:
    """Draw, for every measured input, the share of its variance that its first components explain.

    One thin line for each input, coloured by the matrices that receive it; the bold lines are medians over layers.

    Args:
        spectra: what was measured.
        path: where to write the figure, as .svg, .png or .pdf.

    Returns:
        The figure.

    Raises:
        EvaError: nothing was measured, or the suffix of `path` is unknown.
    """
    groups = _curves_by_kind(spectra)
    if not groups:
        raise EvaError("the spectra hold no inputs, so there is nothing to draw.")
    figure, axes = fresh_axes(7.2, 4.6)
    for (kind, curves), colour in zip(groups.items(), colours(groups).values(), strict=True):
        x = np.arange(curves.shape[1] + 1)
        padded = np.pad(curves, ((0, 0), (1, 0)))
        axes.plot(x, padded.T, color=colour, linewidth=0.6, alpha=0.3)
        label = f"{kind} ({len(curves)} input{'s' * (len(curves) != 1)})"
        axes.plot(x, np.nanmedian(padded, axis=0), color=colour, linewidth=2.4, label=label)
    axes.set_xlim(0, None)
    axes.set_ylim(0, 1.005)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("components kept")
    axes.set_ylabel("share of the input's variance")
    axes.set_title("Variance explained by the first components of each input")
    title = "one line an input, bold the median; an input is named by the matrices that receive it"
    figure.legend(loc="outside lower center", ncols=2, title=title, title_fontsize=8.5)
    return save(figure, path)


def _curves_by_kind(spectra: Spectra) -> dict[str, np.ndarray]:
    """Return cumulative shares (inputs, components) by the matrices that share an input; short rows end with NaN."""
    places = locate(spectra.targets)
    receivers: dict[str, list[str]] = {key: [] for key in spectra.inputs}
    for name, target in spectra.targets.items():
        receivers[target.input].append(places[name].column)
    groups: dict[str, list[np.ndarray]] = {}
    for key, spectrum in spectra.inputs.items():
        kind = ", ".join(dict.fromkeys(receivers[key]))
        groups.setdefault(kind, []).append(np.cumsum(np.asarray(spectrum.explained_variance_ratio, dtype=float)))
    longest = {kind: max(map(len, curves)) for kind, curves in groups.items()}
    return {
        kind: np.stack([np.pad(curve, (0, longest[kind] - len(curve)), constant_values=np.nan) for curve in curves])
        for kind, curves in groups.items()
    }


@styled
def loss_curves(runs: Mapping[str, Log], *, smooth: int = 5, path: str | Path | None = None) -> Figure:
    """Draw the training loss of several runs over their steps, and their held-out loss where it was logged.

    Args:
        runs: the log of each run by its label: entries with "step" and "loss" or "eval_loss".
        smooth: the bold line is the mean of this many steps, the last of which is the step itself; 1 draws one line.
        path: where to write the figure, as .svg, .png or .pdf.

    Returns:
        The figure.

    Raises:
        EvaError: no run logged a loss, `smooth` is below 1, or the suffix of `path` is unknown.
    """
    figure = _curves(runs, "loss", smooth=smooth)
    axes = figure.axes[0]
    for label, look in looks(runs).items():
        steps, values = series(runs[label], "eval_loss")
        if len(steps):
            if len(steps) < 3:  # values before and after training alone make no curve
                look = look | {"linestyle": "none"}
            axes.plot(
                steps, values, marker="D", markersize=5, mfc="white", linewidth=1, label=f"{label}, held out", **look
            )
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Loss while training")
    axes.set_ylim(0, None)
    axes.legend()
    return save(figure, path)


@styled
def gradient_norms(runs: Mapping[str, Log], *, smooth: int = 1, path: str | Path | None = None) -> Figure:
    """Draw the gradient norm of several runs over their steps, on a logarithmic scale.

    Args:
        runs: the log of each run by its label: entries with "step" and "grad_norm".
        smooth: as in `loss_curves`.
        path: where to write the figure, as .svg, .png or .pdf.

    Returns:
        The figure.

    Raises:
        EvaError: no run logged a gradient norm, `smooth` is below 1, or the suffix of `path` is unknown.
    """
    figure = _curves(runs, "grad_norm", smooth=smooth)
    axes = figure.axes[0]
    _use_log_scale(axes)
    axes.set_ylabel("norm of the gradient before clipping")
    axes.set_title("Gradient norm while training")
    axes.legend()
    return save(figure, path)


@styled
def rate_curves(
    scores: Mapping[str, Mapping[float, Sequence[float]]], *, name: str, path: str | Path | None = None
) -> Figure:
    """Draw a score over the learning rate, a line for each method, to see which rate suits which and how sharply.

    Scores that are ten times as large as others, such as the loss of a run that hardly learned, get a logarithmic axis.

    Args:
        scores: for each method, by learning rate: the score, and the two ends of its interval.
        name: of the score, for the axis.
        path: where to write the figure, as .svg, .png or .pdf.

    Returns:
        The figure.

    Raises:
        EvaError: there is no score, or the suffix of `path` is unknown.
    """
    if not any(scores.values()):
        raise EvaError("there is no score at any learning rate; nothing to draw.")
    figure, axes = fresh_axes(7.2, 3.8)
    for label, look in looks(scores).items():
        rates = sorted(scores[label])
        values, lows, highs = np.array([scores[label][rate] for rate in rates], dtype=float).T
        axes.fill_between(rates, lows, highs, color=look["color"], alpha=0.12, linewidth=0)
        axes.plot(rates, values, marker="o", markersize=5, label=label, **look)
    axes.set_xscale("log")
    rates = sorted({rate for points in scores.values() for rate in points})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("learning rate")
    axes.set_ylabel(name)
    axes.set_title(f"{name[0].upper()}{name[1:]} by learning rate")
    ends = [end for points in scores.values() for _, *interval in points.values() for end in interval]
    if min(ends) > 0 and max(ends) > 10 * min(ends):
        _use_log_scale(axes)
    else:
        axes.set_ylim(0, None)
    axes.legend()
    return save(figure, path)


def series(log: Log, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of the log entries that have both, in the order of the steps."""
    points = sorted(
        (entry["step"], float(entry[key])) for entry in log if "step" in entry and entry.get(key) is not None
    )
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)


def trailing_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of each value and the `width - 1` values before it (fewer at the start)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _use_log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _curves(runs: Mapping[str, Log], key: str, *, smooth: int) -> Figure:
    if smooth < 1:
        raise EvaError(f"smooth must be at least 1 step, got {smooth}.")
    figure, axes = fresh_axes(7.2, 3.8)
    for label, look in looks(runs).items():
        steps, values = series(runs[label], key)
        if not len(steps):
            continue
        if smooth > 1:
            axes.plot(steps, values, color=look["color"], linewidth=0.8, alpha=0.35)
        note = f", mean of {smooth} steps" if smooth > 1 else ""
        axes.plot(steps, trailing_mean(values, smooth), label=f"{label}{note}", **look)
    if not axes.lines:
        raise EvaError(f"none of the runs ({', '.join(runs) or 'there are none'}) logged {key!r}; nothing to draw.")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    return figure
