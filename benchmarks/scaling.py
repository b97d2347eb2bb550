"""Cost of streaming PCA against the width of rows, the rank and the rows of a batch, always beside its accuracy.

Commands (synthetic rows, no model):

    python benchmarks/scaling.py width
    python benchmarks/scaling.py rank
    python benchmarks/scaling.py rows
    python benchmarks/scaling.py all --quick      # a few seconds, to see that it runs; writes nothing

Rows have standard deviations i^-0.5 along the axes of a random rotation, and a mean that is not zero. In every round
each contestant gets the same batch, one right after the other, in a random order; ratios are
taken within rounds, and what is reported are medians. Contestants are evatune's backends, the incremental PCA that
PEFT's EVA uses (with the settings that it uses), scikit-learn's, and, as the yardstick, a linear layer d -> d without
bias applied to the same rows. Up to 2,048 features, a float64 eigendecomposition of the very same rows says how much
variance the components miss.

Results go to the terminal, to benchmarks/results/scaling.json (one part an axis), to docs/images and into docs/cost.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from publish import IMAGES, PAGE, RESULTS, fill_block, log_lines, merge_results
from synthetic import scatter_matrix, synthetic_batches
from torch import Tensor

from evatune import StreamingPCA
from evatune.files import write_text
from evatune.hardware import versions_of
from evatune.report.style import MUTED, PALETTE, save, styled
from evatune.tables import markdown_table, text_table
from initialization import captured_of_best, processor

REFERENCE_UP_TO = 2048
"""Width up to which a float64 eigendecomposition is made to compare with."""

N_DIFFERENT = 8
"""How many different batches there are; longer runs go through them again."""

OURS, PEFT, SKLEARN, LINEAR = "evatune auto", "PEFT", "scikit-learn", "linear layer"


@dataclass(frozen=True, kw_only=True)
class Size:
    """One point of an axis."""

    width: int
    """Features, d."""
    rank: int = 32
    """Components, k."""
    rows: int = 1024
    """Rows of a batch, n."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What one command varies."""

    name: str
    """The field of `Size` that varies along a line."""
    contestants: tuple[str, ...]
    """Who takes part."""
    sizes: tuple[Size, ...]
    """In the order in which they are run; contestants that are too slow at one are left out at the larger ones."""
    quick: tuple[Size, ...]
    """The sizes of a smoke run."""
    label: str
    """What the axis is called in figures."""


AXES = {
    "width": Axis(
        name="width",
        contestants=(OURS, "evatune exact", "evatune sketch", PEFT, SKLEARN, LINEAR),
        sizes=tuple(Size(width=d) for d in (256, 576, 1024, 1536, 2048, 4096, 8192)),
        quick=tuple(Size(width=d) for d in (256, 576)),
        label="features, d",
    ),
    "rank": Axis(
        name="rank",
        contestants=(OURS, PEFT, LINEAR),
        sizes=tuple(Size(width=d, rank=k) for d in (576, 1536, 4096) for k in (16, 32, 64, 128, 256)),
        quick=tuple(Size(width=d, rank=k) for d in (256, 576) for k in (16, 32)),
        label="components, k",
    ),
    "rows": Axis(
        name="rows",
        contestants=(OURS, PEFT, LINEAR),
        sizes=tuple(Size(width=d, rows=n) for d in (576, 1536) for n in (64, 128, 256, 512, 1024, 2048, 4096)),
        quick=tuple(Size(width=d, rows=n) for d in (256, 576) for n in (64, 256)),
        label="rows of a batch, n",
    ),
}


# -- contestants ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One object under test, fresh from its maker."""

    add: Callable[[Tensor], Any]
    """Takes the rows of a batch."""
    components: Callable[[], Tensor] | None = None
    """Gives the components in the end; the yardstick has none."""
    facts: Callable[[], dict[str, Any]] = dict
    """Gives what else is reported, in the end."""


def evatune_pca(size: Size, *, backend: str) -> Contestant:
    """Return one of our backends, which is asked for components as at the end of a measurement."""
    pca = StreamingPCA(size.rank, backend=backend)
    return Contestant(
        add=pca.partial_fit,
        components=lambda: pca.refresh().components_,
        facts=lambda: {"backend": pca.backend_, "estimated_missed": pca.captured_error_},
    )


def peft_pca(size: Size) -> Contestant:
    """Return what a hook of PEFT's EVA keeps, made by that hook."""
    from peft.tuners.lora.eva import SVDHook

    pca = SVDHook(name="", n_components=size.rank, sim_thresh=0.99).svd
    return Contestant(add=pca.partial_fit, components=lambda: pca.components_)


def sklearn_pca(size: Size) -> Contestant:
    """Return scikit-learn's incremental PCA."""
    from sklearn.decomposition import IncrementalPCA

    pca = IncrementalPCA(n_components=size.rank)
    return Contestant(
        add=lambda rows: pca.partial_fit(rows.numpy()), components=lambda: torch.from_numpy(pca.components_)
    )


def linear_layer(size: Size) -> Contestant:
    """Return the yardstick: what an adapted layer itself does with these rows."""
    return Contestant(add=torch.nn.Linear(size.width, size.width, bias=False))


CONTESTANTS: dict[str, Callable[[Size], Contestant]] = {
    **{f"evatune {name}": functools.partial(evatune_pca, backend=name) for name in ("auto", "exact", "sketch")},
    PEFT: peft_pca,
    SKLEARN: sklearn_pca,
    LINEAR: linear_layer,
}


# -- timing -----------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What one contestant took at one size: seconds by repetition and batch, and of the final factorizations."""

    batches: list[list[float]] = field(default_factory=list)
    finals: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def spent(self) -> float:
        """Seconds in all."""
        return sum(map(sum, self.batches)) + sum(self.finals)


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Return how many seconds some work took, and what it gave."""
    started = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - started, result


def median_ratio(mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, skip: int) -> float | None:
    """Return the median over rounds of the ratio of two contestants' seconds in the same round.

    Args:
        mine: seconds by repetition and batch.
        theirs: of the other contestant; rounds that only one of the two took part in do not count.
        skip: batches at the start of each repetition that do not count.
    """
    ratios = [
        numerator / denominator
        for own, other in zip(mine, theirs, strict=False)
        for numerator, denominator in list(zip(own, other, strict=False))[skip:]
    ]
    return statistics.median(ratios) if ratios else None


def summarize(record: Record, *, ours: Record | None, linear: Record | None, n_batches: int) -> dict[str, Any]:
    """Return what is reported of one contestant at one size, in milliseconds.

    The time of a batch is the mean over all but the first batch of their medians over repetitions: it includes
    refreshes, which come at batches 2, 4, 8, …, and leaves out stalls of the machine.
    """
    places = [[run[place] for run in record.batches if place < len(run)] for place in range(n_batches)]
    medians = [1e3 * statistics.median(seconds) for seconds in places if seconds]
    later = medians[1:]
    complete = [run for run in record.batches if len(run) == n_batches]
    facts = {
        "first_ms": medians[0],
        "batch_ms": statistics.mean(later) if later else None,
        "usual_ms": statistics.median(later) if later else None,
        "final_ms": 1e3 * statistics.median(record.finals) if record.finals else None,
        "whole_ms": None,
        "over_linear": median_ratio(record.batches, linear.batches, skip=1) if linear else None,
        "over_ours": median_ratio(record.batches, ours.batches, skip=1) if ours else None,
        "complete_runs": len(complete),
        "seconds": [[round(seconds, 6) for seconds in run] for run in record.batches],
    }
    if complete:
        facts["whole_ms"] = sum(medians) + (facts["final_ms"] or 0.0)
    return facts | record.facts


def run_size(size: Size, names: Sequence[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run all contestants in paired rounds at one size and return what is reported of each."""
    batches = synthetic_batches(N_DIFFERENT, rows=size.rows, width=size.width)
    order = [index % N_DIFFERENT for index in range(args.batches)]
    records = {name: Record() for name in names}
    components: dict[str, Tensor] = {}
    for name in names:  # kernels are chosen and memory is found at the first call of a shape
        warm = CONTESTANTS[name](size)
        for rows in batches[:2]:
            warm.add(rows)
    dice = random.Random(0)
    started = time.perf_counter()
    for repeat in range(args.repeats):
        if repeat and time.perf_counter() - started > args.seconds * len(names) / 2:
            break
        # Who has used up its time leaves this size; what it did so far counts.
        running = {name: CONTESTANTS[name](size) for name in names if records[name].spent <= args.seconds}
        for name in running:
            records[name].batches.append([])
        for index in order:
            for name in dice.sample(list(running), len(running)):
                if records[name].spent > args.seconds:
                    del running[name]
                    continue
                seconds, _ = timed(running[name].add, batches[index])
                records[name].batches[-1].append(seconds)
                if name == SKLEARN:
                    time.sleep(0.05)  # the threads of its BLAS go on spinning and would slow down the next one
        for name in dice.sample(list(running), len(running)):
            contestant = running[name]
            if contestant.components is not None:
                seconds, components[name] = timed(contestant.components)
                records[name].finals.append(seconds)
                records[name].facts = contestant.facts()
    if size.width <= REFERENCE_UP_TO and components:
        scatter_dd = scatter_matrix(batches, order)
        eigenvalues_d = torch.linalg.eigvalsh(scatter_dd).flip(0)
        for name, found in components.items():
            records[name].facts["missed"] = 1 - captured_of_best(scatter_dd, found, eigenvalues_d)
    ours, linear = records.get(OURS), records.get(LINEAR)
    return {
        name: summarize(record, ours=ours, linear=linear, n_batches=args.batches)
        for name, record in records.items()
        if any(record.batches)
    }


def group_of(size: dict[str, int], axis: Axis) -> dict[str, int]:
    """Return what stays the same along a line."""
    return {name: value for name, value in size.items() if name != axis.name}


def run_axis(axis: Axis, args: argparse.Namespace) -> dict[str, Any]:
    """Run all sizes of an axis and return its part of the results."""
    points: list[dict[str, Any]] = []
    too_slow: dict[str, dict[str, int]] = {}  # the size at which a contestant was
    for size in axis.quick if args.quick else axis.sizes:
        now = asdict(size)
        larger = {name for name, then in too_slow.items() if all(value >= then[field] for field, value in now.items())}
        names = [name for name in axis.contestants if name not in larger]
        print(f"{axis.name}: {now['width']:,} features, {now['rank']} components, {now['rows']:,} rows …", flush=True)
        found = run_size(size, names, args)
        points.append({"size": now, "contestants": found})
        for name, facts in found.items():
            if name != LINEAR and max(facts["first_ms"], facts["usual_ms"] or 0.0) > 1e3 * args.limit:
                too_slow.setdefault(name, now)
                print(f"{name} took over {args.limit:g} s for a batch and is left out at larger sizes", flush=True)
    packages = ["evatune", "torch", "peft", "scikit-learn"]
    return {
        "points": points,
        "settings": {name: getattr(args, name) for name in ("batches", "repeats", "limit", "seconds", "quick")},
        "machine": {"processor": processor(), "threads": args.threads, "python": platform.python_version()},
        "versions": versions_of(*packages),
    }


# -- what is shown ----------------------------------------------------------------------------------------------------


HEADERS = ["first batch", "a batch", "without refreshes", "× linear", "× auto", "at the end"]
HEADERS += ["missed", "estimated"]
SYMBOLS = {"width": "d", "rank": "k", "rows": "n"}


def table(part: dict[str, Any], make: Callable[..., str]) -> str:
    """Return the table of an axis, made by `make`; times are milliseconds, and what never changes has no column."""
    sizes = [point["size"] for point in part["points"]]
    varying = [name for name in SYMBOLS if len({size[name] for size in sizes}) > 1]

    def short(value: float | None, form: str = ".3g") -> str | None:
        return None if value is None or not math.isfinite(value) else f"{value:{form}}"

    def milliseconds(value: float | None) -> str | None:
        return None if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    rows = []
    for point in part["points"]:
        size = point["size"]
        for name, facts in point["contestants"].items():
            backend = facts.get("backend")
            shown = f"{name} ({backend})" if backend and not name.endswith(backend) else name
            rows.append(
                [
                    *(str(size[name]) for name in varying),
                    shown,
                    *(milliseconds(facts[key]) for key in ("first_ms", "batch_ms", "usual_ms")),
                    short(facts["over_linear"]),
                    short(facts["over_ours"]),
                    milliseconds(facts["final_ms"]),
                    short(facts.get("missed"), ".1e"),
                    short(facts.get("estimated_missed"), ".1e"),
                ]
            )
    headers = [*(SYMBOLS[name] for name in varying), "contestant", *HEADERS]
    return make(headers, rows, align="r" * len(varying) + "l" + "r" * len(HEADERS))


def flatness(part: dict[str, Any]) -> list[str]:
    """Say for each width what the largest rank costs evatune, as a multiple of what the smallest does."""
    widths = dict.fromkeys(point["size"]["width"] for point in part["points"])
    sentences = []
    for width in widths:
        points = [point for point in part["points"] if point["size"]["width"] == width]
        low, high = (pick(points, key=lambda point: point["size"]["rank"]) for pick in (min, max))
        small, large = low["contestants"].get(OURS), high["contestants"].get(OURS)
        if all(facts and facts[key] for facts in (small, large) for key in ("batch_ms", "whole_ms")):
            batch, whole = (large[key] / small[key] for key in ("batch_ms", "whole_ms"))
            ranks = [point["size"]["rank"] for point in (high, low)]
            sentences.append(
                f"d = {width}: {ranks[0]} components cost evatune {batch:.2f} times as much a batch as {ranks[1]}, and"
                f" {whole:.2f} times as much for {part['settings']['batches']} batches and the factorization at the end"
            )
    return sentences


LOOKS: dict[str, dict[str, Any]] = {
    OURS: {"color": PALETTE[1], "linewidth": 2.6, "marker": "o", "markersize": 4.5, "zorder": 4},
    "evatune exact": {"color": "#8a3c00", "linestyle": "--", "linewidth": 1.3, "marker": "s", "markersize": 3},
    "evatune sketch": {"color": PALETTE[4], "linestyle": (0, (1, 1)), "linewidth": 1.6, "marker": "^", "markersize": 4},
    PEFT: {"color": PALETTE[0], "marker": "o", "markersize": 3.5},
    SKLEARN: {"color": PALETTE[2], "marker": "o", "markersize": 3.5},
    LINEAR: {"color": MUTED, "linestyle": "--", "linewidth": 1.2},
}


MISSED_FLOOR = 1e-8
"""Shares below, which rounding of the reference does not tell from zero, are drawn here."""


def limits_of(part: dict[str, Any], key: str, *, floor: float) -> tuple[float, float]:
    """Return between which values all panels of one kind are drawn, so that they can be compared."""
    found = [facts.get(key) for point in part["points"] for facts in point["contestants"].values()]
    known = [max(value, floor) for value in found if value is not None] or [1.0]
    return min(known) / 1.6, max(known) * 1.6


@styled
def draw(part: dict[str, Any], *, axis: Axis, path: Path) -> Figure:
    """Draw an axis: milliseconds a batch above, the share of variance missed below, one column a group of sizes.

    A single group is drawn side by side instead.
    """
    groups = list(dict.fromkeys(tuple(group_of(point["size"], axis).items()) for point in part["points"]))
    wide = len(groups) == 1
    figure = Figure(figsize=(9.6, 4.2 if wide else 5.8), layout="constrained")
    panels = figure.subplots(*((1, 2) if wide else (2, len(groups))), squeeze=False)
    limits = {key: limits_of(part, key, floor=floor) for key, floor in (("batch_ms", 0.0), ("missed", MISSED_FLOOR))}
    for column, group in enumerate(groups):
        time_axes, missed_axes = panels[0] if wide else panels[:, column]
        points = [point for point in part["points"] if tuple(group_of(point["size"], axis).items()) == group]
        names = [name for name in axis.contestants if any(name in point["contestants"] for point in points)]

        def lines(key: str, names=names, points=points) -> dict[str, list[tuple[float, float | None]]]:
            return {
                name: [(point["size"][axis.name], point["contestants"].get(name, {}).get(key)) for point in points]
                for name in names
            }

        log_lines(time_axes, lines("batch_ms"), looks=LOOKS, limits=limits["batch_ms"])
        constants = ", ".join(f"{SYMBOLS[name]} = {value:,}" for name, value in group)
        time_axes.set_title(f"Milliseconds a batch, {constants}" if wide else constants)
        if min(dict(group).get("width", 0), points[0]["size"]["width"]) > REFERENCE_UP_TO:
            missed_axes.set_axis_off()
            text = f"no float64 reference\nabove {REFERENCE_UP_TO:,} features"
            missed_axes.text(0.5, 0.5, text, ha="center", va="center", color=MUTED, transform=missed_axes.transAxes)
        else:
            missed = {name: points for name, points in lines("missed").items() if name != LINEAR}
            log_lines(missed_axes, missed, looks=LOOKS, limits=limits["missed"])
            missed_axes.set_xlabel(axis.label)
        if wide:
            missed_axes.set_title("Share of the best captured variance that is missed")
            time_axes.set_xlabel(axis.label)
        elif column == 0:
            time_axes.set_ylabel("milliseconds a batch")
            missed_axes.set_ylabel("share of variance missed")
    return save(figure, path)


def publish(axis: Axis, part: dict[str, Any], *, images: Path, page: Path | None) -> None:
    """Draw the figure of an axis and, where there is a page, put figure and table into it."""
    draw(part, axis=axis, path=images / f"cost-{axis.name}.png")
    if page is None:
        return
    machine, versions = part["machine"], part["versions"]
    content = [f"![Cost against {axis.label}](images/cost-{axis.name}.png)", ""]
    content += [table(part, markdown_table), ""]
    content += [f"{sentence}." for sentence in (flatness(part) if axis.name == "rank" else [])]
    content += [
        f"{machine['processor']}, {machine['threads']} threads, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; medians of {part['settings']['repeats']} runs of {part['settings']['batches']} batches."
    ]
    write_text(page, fill_block(page.read_text(encoding="utf-8"), f"cost-{axis.name}", "\n".join(content)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axis", choices=[*AXES, "all"])
    parser.add_argument("--batches", type=int, default=16, help="batches of one run")
    parser.add_argument("--repeats", type=int, default=3, help="runs, each from the start")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=3.0, help="seconds a batch above which no larger size is run")
    parser.add_argument("--seconds", type=float, default=60.0, help="a contestant leaves a size after so many seconds")
    parser.add_argument("--quick", action="store_true", help="few and small sizes, one short run, nothing written")
    parser.add_argument("--redraw", action="store_true", help="run nothing: figures and page from the results")
    parser.add_argument("--output", type=Path, help="results; benchmarks/results/scaling.json by default")
    parser.add_argument("--images", type=Path, help="folder of the figures; docs/images by default")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.repeats = min(args.batches, 4), 1
    elsewhere = args.quick or args.output is not None or args.images is not None
    output, images = args.output or RESULTS / "scaling.json", args.images or IMAGES
    write = not args.quick or (args.output is not None and args.images is not None)
    torch.set_num_threads(args.threads)
    for name in AXES if args.axis == "all" else [args.axis]:
        axis = AXES[name]
        if args.redraw:
            part = json.loads(output.read_text(encoding="utf-8"))[name]
        else:
            from threadpoolctl import threadpool_limits

            with torch.no_grad(), threadpool_limits(args.threads):
                part = run_axis(axis, args)
            if write:
                merge_results(output, name, part)
        print("\n" + table(part, text_table))
        print("\n".join(["times in milliseconds", *(flatness(part) if name == "rank" else [])]) + "\n", flush=True)
        if write:
            publish(axis, part, images=images, page=None if elsewhere else PAGE)


if __name__ == "__main__":
    main()
