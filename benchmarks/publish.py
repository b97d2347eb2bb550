"""How benchmarks show what they found: merged results, lines on logarithmic axes, blocks of the page docs/cost.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from evatune.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
PAGE = ROOT / "docs" / "cost.md"

Points = Sequence[tuple[float, float | None]]


def merge_results(path: Path, part: str, facts: Any) -> None:
    """Put `facts` under the key `part` of a JSON file and leave its other parts, which are of other runs."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_text(path, json.dumps(results | {part: facts}, indent=1, allow_nan=False) + "\n")


def fill_block(text: str, name: str, content: str) -> str:
    """Return a page with new content between its comments `<!-- name: begin … -->` and `<!-- name: end -->`.

    Args:
        text: the page.
        name: of the block.
        content: Markdown, without blank lines around it.

    Raises:
        ValueError: the page has no such block, or several.
    """
    opening, closing = f"<!-- {name}: begin", f"<!-- {name}: end -->"
    if text.count(opening) != 1 or text.count(closing) != 1 or text.index(opening) > text.index(closing):
        raise ValueError(f"the page must have one block between '{opening} … -->' and '{closing}'.")
    before, rest = text.split(opening)
    comment, after = rest.split("-->", 1)[0], rest.split(closing)[1]
    return f"{before}{opening}{comment}-->\n\n{content}\n\n{closing}{after}"


def spread(wanted: Sequence[float], *, least: float) -> list[float]:
    """Move places apart until neighbours are at least `least` from each other, in their order, as little as can be.

    Args:
        wanted: where labels should stand.
        least: the least distance between two of them.

    Returns:
        Where they stand: places that touch make a group about their common mean.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[int]] = []

    def middle(group: list[int]) -> float:
        return sum(wanted[i] for i in group) / len(group)

    for index in order:
        groups.append([index])
        while len(groups) > 1:
            lower, upper = groups[-2:]
            if middle(upper) - middle(lower) >= least * (len(lower) + len(upper)) / 2:
                break
            groups[-2:] = [lower + upper]
    places = [0.0] * len(wanted)
    for group in groups:
        for number, index in enumerate(group):
            places[index] = middle(group) + least * (number - (len(group) - 1) / 2)
    return places


def apart(places: Sequence[float], *, least: float) -> list[float]:
    """Return those of ascending places whose labels do not touch on a logarithmic axis, from the last one down.

    Args:
        places: positive and ascending.
        least: the least distance of two labels, as a share of the axis.
    """
    kept: list[float] = []
    for place in reversed(places):
        if not kept or math.log(kept[-1] / place) >= least * math.log(places[-1] / places[0]):
            kept.append(place)
    return kept[::-1]


def log_lines(
    axes: Axes,
    lines: Mapping[str, Points],
    *,
    looks: Mapping[str, Mapping[str, Any]],
    limits: tuple[float, float],
) -> None:
    """Draw lines on logarithmic axes and write the name of each at its right end, in its colour.

    Args:
        axes: where to draw.
        lines: points by name; a point without a value is left out, and a line without points is not drawn.
        looks: keyword arguments of `Axes.plot` by name.
        limits: least and largest value shown. What is below, such as zero, which has no place on a logarithmic axis,
            is drawn a little above the lower edge.
    """
    low, high = limits
    ends: dict[str, tuple[float, float]] = {}
    for name, points in lines.items():
        known = [(x, max(y, 1.3 * low)) for x, y in points if y is not None]
        if known:
            axes.plot(*zip(*known, strict=True), **looks[name])
            ends[name] = known[-1]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    shown = apart(ticks, least=0.09)
    axes.set_xticks(ticks, [f"{x:.0f}" if x in shown else "" for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=7.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 1e3 else (1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}" if y >= 1e-3 else f"{y:.0e}")
    span = math.log(high / low)
    height = axes.get_figure().get_size_inches()[1] / axes.get_subplotspec().get_gridspec().nrows - 1.0
    places = spread([math.log(y / low) / span for _, y in ends.values()], least=0.16 / height)  # inches for a line
    for (name, end), place in zip(ends.items(), places, strict=True):
        axes.annotate(
            name,
            xy=end,
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=looks[name]["color"],
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": looks[name]["color"], "linewidth": 0.5, "alpha": 0.6},
        )
