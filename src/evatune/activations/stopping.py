"""When an input has been measured enough: the paper's rule on directions, and a rule on accuracy beside it.

The paper's rule (Section 3.2, Algorithm 1) is that each component has cosine τ with itself one update before. Steps
shrink as rows accumulate, so it is met in the end whatever the error is. The second rule asks for what matters: how
much more variance of rows that were not seen yet did the last doubling of the data capture?
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evatune.errors import EvaError
from evatune.pca import StreamingPCA
from evatune.pca.subspace import captured_variance, component_cosines

CONVERGED = "converged"
ACCURATE = "accurate"
BATCH_CAP = "batch cap"
EXHAUSTED = "data exhausted"
INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True)
class StoppingRule:
    """An input is done as soon as one of the two rules is met."""

    tau: float | None = 0.99
    """Cosine of a component with itself one update before that counts as converged; None switches the rule off."""
    delta: float = 1.0
    """Share of the components of an input that must have converged."""
    min_gain: float | None = 0.01
    """Gain in captured variance of unseen rows from doubling the data below which measuring more is not worth it, as
    a share of what is captured; None switches the rule off."""

    def __post_init__(self) -> None:
        if self.tau is not None and not 0 < self.tau <= 1:
            raise EvaError(f"tau must be in (0, 1], got {self.tau!r}; the paper takes 0.99.")
        if not 0 < self.delta <= 1:
            raise EvaError(f"delta must be in (0, 1], got {self.delta!r}; 1 asks all components to converge.")
        if self.min_gain is not None and not 0 < self.min_gain < 1:
            raise EvaError(f"min_gain must be in (0, 1), got {self.min_gain!r}; None switches the rule off.")


def is_check(n_batches: int) -> bool:
    """Tell whether rules are checked around the batch after `n_batches`: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, …

    Checks factorize, so their number should grow with the logarithm of the data only.
    """
    power = 1 << max(n_batches.bit_length() - 1, 0)
    return n_batches >= 1 and n_batches in (power, power + power // 2)


class StoppingMonitor:
    """Follows every input through the checks and remembers why each is done.

    Attributes:
        done: reason by input key, once there is one.
        gains: by input key, the gain of the last check: captured variance of unseen rows with the components of now,
            against those of about half the data, as a share of the former.
    """

    def __init__(self, rule: StoppingRule) -> None:
        self.rule = rule
        self.done: dict[str, str] = {}
        self.gains: dict[str, float] = {}
        self._history: dict[str, list[Tensor]] = {}

    def before_update(self, key: str, pca: StreamingPCA, rows_nd: Tensor, n_needed: int) -> None:
        """Look at the rows of a check batch before they are added.

        Args:
            key: the input.
            pca: what is known of it so far.
            rows_nd: rows that it has not seen, (n, d).
            n_needed: how many components the present plan needs.
        """
        components_kd = pca.components_
        # Checks come at 1, 2, 3, 4, 6, 8, 12, … batches: two checks ago there were half the rows.
        history = self._history[key] = [*self._history.get(key, [])[-2:], components_kd]
        if self.rule.min_gain is None or len(history) < 3 or not len(rows_nd):
            return
        rows_nd = rows_nd.to(components_kd.dtype)
        now = captured_variance(rows_nd, components_kd[:n_needed], pca.mean_)
        then = captured_variance(rows_nd, history[0][:n_needed], pca.mean_)
        gain = float((now - then) / now.clamp_min(torch.finfo(now.dtype).tiny))
        # One batch is a noisy sample: two checks in a row must agree.
        if max(gain, self.gains.get(key, 1.0)) < self.rule.min_gain:
            self.done.setdefault(key, ACCURATE)
        self.gains[key] = gain

    def after_update(self, key: str, pca: StreamingPCA, n_needed: int) -> None:
        """Compare the components after a check batch with those before it."""
        if self.rule.tau is None or key not in self._history:
            return
        # Components cannot have settled while twice the data still gain much, and looking costs a factorization.
        if self.rule.min_gain is not None and self.gains.get(key, 0.0) > 5 * self.rule.min_gain:
            return
        before_kd = self._history[key][-1]
        cosines_k = component_cosines(pca.components_[:n_needed], before_kd[:n_needed])
        if n_needed == 0 or float((cosines_k >= self.rule.tau).float().mean()) >= self.rule.delta:
            self.done.setdefault(key, CONVERGED)
