"""What the runs of a sweep took: the time of their start beside that of training, and their peak memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evatune.compare.results import Record, is_whole
from evatune.exhibits.runs import behind
from evatune.exhibits.view import View
from evatune.methods import parse_method
from evatune.report import comparisons
from evatune.report.style import Figure
from evatune.tables import Table, linked, number


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Medians over the runs of a method that nothing interrupted."""

    start: float | None
    """Seconds to measure and to initialize; None where all took spectra that other runs had measured."""
    train: float
    """Seconds to train."""
    peak_gib: float | None
    """The largest peak of memory; None where it was not measured."""

    @property
    def share(self) -> float | None:
        """The start as a share of start and training."""
        return None if self.start is None else self.start / (self.start + self.train)


def cost_of(records: Sequence[Record]) -> Cost | None:
    """Return what runs of one method took; None if none of them went to its end in one go."""
    whole = [record for record in records if is_whole(record)]
    if not whole:
        return None
    prepare, train = (float(np.median([record["seconds"][part] for record in whole])) for part in ("prepare", "train"))
    measure = [record["seconds"]["measure"] for record in whole if "measure" in record["seconds"]]
    start: float | None = prepare
    method = parse_method(whole[0]["recipe"]["adapter"]["method"]).method
    if method.needs_spectra and not method.needs_all_components:  # all components are measured while it initializes
        start = prepare + float(np.median(measure)) if measure else None
    peaks = [record["peak_memory_gib"] for record in whole if record.get("peak_memory_gib")]
    return Cost(start=start, train=train, peak_gib=max(peaks, default=None))


def table(view: View) -> Table:
    """Return what the runs took: time to start and to train, peak memory, trainable parameters (Table 25)."""
    rows: list[list[object]] = []
    for row in view.board.rows:
        cost = cost_of(row.records)
        if cost is not None:
            rows.append(
                [
                    row.title,
                    row.method,
                    linked(row.trainable, behind(row.records)),
                    None if cost.start is None else number(cost.start, ".1f"),
                    number(cost.train, ".1f"),
                    None if cost.share is None else number(cost.share, ".1%"),
                    None if cost.peak_gib is None else number(cost.peak_gib, ".2f"),
                ]
            )
    headers = ["task", "method", "parameters", "start, s", "training, s", "start, share", "peak GiB"]
    caption = "Medians over the test runs that nothing interrupted. `start` is measuring and initializing."
    if any(row[3] is None for row in rows):
        caption += " Where it is missing, all runs took spectra that runs of another method had measured."
    return Table(name="costs", headers=headers, rows=rows, caption=caption)


def figure(view: View) -> Figure:
    """Draw the share of time that the start takes, for each method with runs that measured themselves."""
    costs = {method: cost_of(records) for method, records in view.test_runs(view.one_task).items()}
    shares = {method: cost.share for method, cost in costs.items() if cost is not None and cost.share is not None}
    title = f"Start over start and training, {view.one_task}"
    return comparisons.bars(shares, x="share of the time", title=title, form=".1%")
