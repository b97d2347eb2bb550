"""Which methods differ from the reference, by how much, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evatune.compare.board import Board, paired_outcomes
from evatune.compare.statistics import Difference, holm, paired_difference

LEVEL = 0.05
"""A corrected p-value below it is called more than chance."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One method on one task, against the reference."""

    task: str
    method: str
    difference: Difference
    """Positive where the method is better."""
    p: float
    """Corrected for all comparisons."""

    @property
    def verdict(self) -> str:
        """What can be said; of a single seed nothing, since another seed may say the opposite."""
        if self.difference.n_seeds < 2:
            return "one seed"
        if self.p >= LEVEL:
            return "not told apart"
        return "better" if self.difference.estimate.value > 0 else "worse"


def differences(board: Board, reference: str) -> list[Compared]:
    """Return the differences of all methods to one, paired by seed and example, the best of each task first.

    Empty where no other method shares a seed with the reference, or metrics are no means over examples.

    Args:
        board: the scores.
        reference: one of its methods.

    Cost: a bootstrap of 2,000 resamples for each.
    """
    found = []
    for task in board.tasks:
        theirs = board.at(reference, task)
        for method in board.methods:
            ours = board.at(method, task)
            pairs = paired_outcomes(ours, theirs) if ours and theirs and method != reference else []
            if pairs:
                found.append((task, method, paired_difference([board.sign(task) * one for one in pairs])))
    corrected = holm([difference.p for *_, difference in found])
    compared = [
        Compared(task=task, method=method, difference=difference, p=p)
        for (task, method, difference), p in zip(found, corrected, strict=True)
    ]
    return sorted(compared, key=lambda one: (board.tasks.index(one.task), -one.difference.estimate.value))


def of_task(compared: Sequence[Compared], task: str) -> list[Compared]:
    """Return those of a task."""
    return [one for one in compared if one.task == task]
