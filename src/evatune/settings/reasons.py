"""Why measuring an input ended: each reason with its meaning and the setting that changes it."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why measuring an input ended."""

    CONVERGED = "converged"
    ACCURATE = "accurate"
    BATCH_CAP = "batch cap"
    EXHAUSTED = "data exhausted"
    INTERRUPTED = "interrupted"
    FEWER_ROWS = "fewer rows than components"
    TOO_FEW_ROWS = "too few rows"

    @property
    def text(self) -> str:
        """What the reason means, and which setting changes it."""
        return _TEXTS[self]


_TEXTS = {
    Reason.CONVERGED: (
        "the components that the plan needs no longer turned from one batch to the next; `tau` says how little they may"
        " turn, `delta` how many of them must have settled"
    ),
    Reason.ACCURATE: (
        "doubling the data would have gained less than `min_gain` of captured variance; a smaller `min_gain` goes on"
        " longer"
    ),
    Reason.BATCH_CAP: "`max_batches` were measured, and no rule had ended it; raise `max_batches` to go on longer",
    Reason.EXHAUSTED: "the data ended, and no rule had ended it; give more data to go on longer",
    Reason.INTERRUPTED: "it was interrupted; what had been measured until then was kept",
    Reason.FEWER_ROWS: (
        "measuring ended before there were as many rows as components, so the last components are arbitrary; give more"
        " data, raise `max_batches`, or take a smaller `rank`, `rho` or `n_components`"
    ),
    Reason.TOO_FEW_ROWS: (
        "an expert got fewer rows than components are kept, so others of its block stand in for it; give more data or"
        " a smaller `rank`, `rho` or `n_components`"
    ),
}
