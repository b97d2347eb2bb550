"""Figures and tables by name: what each shows, what it is made of, and the function that makes it.

A row is light, so that `evatune table --help` imports nothing heavy. A new exhibit is a function that takes a
`evatune.exhibits.view.View`, and a row.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evatune.errors import EvaError, near_misses

RESULTS, SPECTRA, ADAPTERS = "results", "spectra", "adapters"


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """One row."""

    idea: str
    """What it shows, in a few words."""
    of: str
    """What it is made of: a folder of `results` of `evatune compare`, folders of `spectra`, or results that kept their
    `adapters`."""
    home: str
    """Home of the function that takes a view and returns a table or a figure."""
    paper: str = ""
    """What it is in the paper."""
    of_task: bool = False
    """Whether it shows a single task of the results."""

    @property
    def title(self) -> str:
        """What it shows, with a capital."""
        return f"{self.idea[0].upper()}{self.idea[1:]}"


def _row(idea: str, of: str, home: str, paper: str = "", *, of_task: bool = False) -> Exhibit:
    return Exhibit(idea=idea, of=of, home=f"evatune.exhibits.{home}", paper=paper, of_task=of_task)


TABLES: dict[str, Exhibit] = {
    "scores": _row(
        "mean and deviation of the test scores, methods × tasks",
        RESULTS,
        "scores:scores",
        "Tables 2 to 4, 9 to 12, ...",
    ),
    "settings": _row("what was chosen on validation data, and grids that ended early", RESULTS, "scores:settings"),
    "intervals": _row("interquartile means with bootstrap intervals", RESULTS, "scores:intervals"),
    "improvement": _row("probability that a run beats one of the reference", RESULTS, "scores:improvement"),
    "paired": _row("differences to the reference by example, corrected p-values", RESULTS, "scores:paired"),
    "ranks": _row("mean ranks of the methods, and the critical difference", RESULTS, "scores:ranks"),
    "wins": _row("wins, ties and losses against the reference", RESULTS, "scores:wins"),
    "costs": _row("time to start and to train, peak memory", RESULTS, "costs:table", "Table 25"),
    "steps": _row("steps to reach the reference's final training loss", RESULTS, "curves:steps_saved", of_task=True),
    "budget": _row("rank and parameters of each kind of matrix over ρ", SPECTRA, "ranks:budget"),
    "metrics": _row("ranks by metric of explained variance", SPECTRA, "ranks:metrics"),
    "movement": _row("how far training moved A, by matrix", ADAPTERS, "adapters:moved", "Table 8", of_task=True),
    "distance": _row("how far apart methods end, by matrix", ADAPTERS, "adapters:apart", "Table 7", of_task=True),
}
"""All tables by name."""

FIGURES: dict[str, Exhibit] = {
    "loss": _row("training loss over the steps", RESULTS, "curves:loss", "Figures 2 left, 6", of_task=True),
    "gradients": _row("gradient norm over the steps", RESULTS, "curves:gradients", of_task=True),
    "first-gradient": _row(
        "gradient norm of the first step", RESULTS, "curves:first_gradient", "Theorem 3.2", of_task=True
    ),
    "rates": _row("validation score over the learning rate", RESULTS, "curves:rates", of_task=True),
    "parameters": _row(
        "score over trainable parameters, with the Pareto front",
        RESULTS,
        "curves:parameters",
        "Figures 3, 4, Table 13",
        of_task=True,
    ),
    "rho": _row("score over ρ", RESULTS, "curves:rho", "Figure 14", of_task=True),
    "differences": _row(
        "differences to the reference with 95% intervals, in colour where beyond chance",
        RESULTS,
        "curves:differences",
        of_task=True,
    ),
    "critical-difference": _row("mean ranks, and which cannot be told apart", RESULTS, "curves:critical_difference"),
    "cost": _row("time to start as a share of the run", RESULTS, "costs:figure", "Table 25", of_task=True),
    "rank-maps": _row("ranks and their changes over ρ", SPECTRA, "ranks:maps", "Figures 7 to 10, 12, 13"),
    "variance": _row("variance that the first components explain", SPECTRA, "ranks:variance"),
    "convergence": _row("share of inputs that converged over time", SPECTRA, "ranks:convergence", "Figure 5 left"),
    "similarity": _row("overlap of components between measurements", SPECTRA, "ranks:similar", "Figures 5 right, 11"),
    "movement": _row("how far training moved A", ADAPTERS, "adapters:moved_figure", "Figure 2 right", of_task=True),
    "updates": _row("cosines of trained updates between methods", ADAPTERS, "adapters:updates", of_task=True),
}
"""All figures by name."""


def find_exhibit(name: str, known: Mapping[str, Exhibit], *, kind: str, task: str | None = None) -> Exhibit:
    """Return a row.

    Args:
        name: its name.
        known: `TABLES` or `FIGURES`.
        kind: what errors call it.
        task: the task that is asked for.

    Raises:
        EvaError: there is none of this name, or it shows no single task.
    """
    if name not in known:
        raise EvaError(f"there is no {kind} {name!r}{near_misses(name, known)}; there are {', '.join(known)}.")
    if task is not None and not known[name].of_task:
        raise EvaError(f"{kind} {name!r} is not of a single task; leave out --task {task}.")
    return known[name]


def make(exhibit: Exhibit, view: Any) -> Any:
    """Return the table or the figure of a row."""
    module, _, function = exhibit.home.partition(":")
    return getattr(importlib.import_module(module), function)(view)


def listing(known: Mapping[str, Exhibit]) -> str:
    """Return the rows as lines for a help text."""
    width = max(map(len, known))
    return "\n".join(
        f"  {name:<{width}}  {row.idea}{f' ({row.paper})' if row.paper else ''}; of {row.of}"
        for name, row in known.items()
    )
