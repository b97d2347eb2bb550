"""When an input has been measured enough: the paper's rule on directions, and a rule on accuracy beside it.

The paper's rule (Section 3.2, Algorithm 1) is that each component has cosine τ with itself one update before. Steps
shrink as rows accumulate, so it is met in the end whatever the error is. The second rule asks for what matters: how
much more variance of rows that were not seen yet did the last doubling of the data capture?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evatune.activations.layers import AnyPCA
from evatune.errors import EvaError
from evatune.pca.subspace import component_cosines

CONVERGED = "converged"
ACCURATE = "accurate"
BATCH_CAP = "batch cap"
EXHAUSTED = "data exhausted"
INTERRUPTED = "interrupted"

ENOUGH_ROWS = 2048
"""How many unseen rows a gain is measured on; fewer say little about rows to come."""


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

    @property
    def is_on(self) -> bool:
        """Whether either rule can end the measurement; without one, checks would factorize for nothing."""
        return self.tau is not None or self.min_gain is not None


def is_check(n_batches: int) -> bool:
    """Tell whether rules are checked around the batch after `n_batches`: 2, 3, 4, 6, 8, 12, 16, 24, 32, …

    Checks factorize, so their number should grow with the logarithm of the data only.
    """
    power = 1 << max(n_batches.bit_length() - 1, 0)
    return n_batches >= 2 and n_batches in (power, power + power // 2)


class StoppingMonitor:
    """Follows every input through the checks and remembers why each is done.

    A check begins before a batch (`begin_check`). The rows that follow are scored before they are added
    (`score_unseen`) until there are `ENOUGH_ROWS`, and the components after the batch are compared with those before
    (`compare_update`). `conclude` decides once a batch for all inputs; until then everything stays on its device.

    Attributes:
        done: reason by input key, once there is one.
        gains: by input key, the gain of the last check: captured variance of unseen rows with the components of now,
            against those of about half the data, as a share of the former.
    """

    def __init__(self, rule: StoppingRule, *, checks_per_doubling: int = 2) -> None:
        self.rule = rule
        self.checks_per_doubling = checks_per_doubling
        self.done: dict[str, str] = {}
        self.gains: dict[str, float] = {}
        self._history: dict[str, list[Tensor]] = {}
        self._shares: dict[str, Tensor] = {}
        self._energies: dict[str, Tensor] = {}
        self._n_scored: dict[str, int] = {}

    def begin_check(self, key: str, components_kd: Tensor) -> None:
        """Take the components of an input as they are now, (k, d)."""
        # With checks at 2, 3, 4, 6, 8, 12, … batches, there were half the rows two checks ago.
        history = self._history[key] = [*self._history.get(key, [])[-self.checks_per_doubling :], components_kd]
        self._energies.pop(key, None)
        self._n_scored.pop(key, None)
        if self.rule.min_gain is not None and len(history) > self.checks_per_doubling:
            self._n_scored[key] = 0

    def scores(self, key: str) -> bool:
        """Tell whether rows of this input are still wanted for scoring."""
        return key in self._n_scored

    def score_unseen(self, key: str, pca: AnyPCA, rows: Any, *, n_needed: int) -> None:
        """Score rows that an input has not seen, with the components of the last check and of half its data.

        Args:
            key: the input.
            pca: what has been learned of it so far.
            rows: the rows, as `pca` takes them.
            n_needed: how many components the present plan needs.
        """
        bases = [self._history[key][age][:n_needed] for age in (-1, 0)]
        self._energies[key] = pca.captured_energies(rows, bases) + self._energies.get(key, 0.0)
        self._n_scored[key] += len(rows) if isinstance(rows, Tensor) else sum(map(len, rows))

    def compares(self, key: str) -> bool:
        """Tell whether the components after this batch are to be compared, which costs a factorization."""
        # They cannot have settled while twice the data still gain much.
        gains_much = self.rule.min_gain is not None and self.gains.get(key, 0.0) > 5 * self.rule.min_gain
        return self.rule.tau is not None and key in self._history and not gains_much

    def compare_update(self, key: str, components_kd: Tensor, *, n_needed: int) -> None:
        """Compare the components after a check's batch, (k, d), with those before it."""
        cosines_k = component_cosines(components_kd[:n_needed], self._history[key][-1][:n_needed])
        converged_k = cosines_k >= (self.rule.tau or 0.0)
        self._shares[key] = converged_k.double().mean() if n_needed else cosines_k.new_ones(())

    def pool(self, add: Callable[[Tensor], Tensor]) -> None:
        """Make what was scored that of all processes together.

        Args:
            add: sums a tensor over the processes; all have had the same checks of the same inputs.
        """
        keys = list(self._history)
        scored = [[*self._energies.get(key, torch.zeros(2)).tolist(), self._n_scored.get(key, 0)] for key in keys]
        if not keys:
            return
        for key, (now, then, n_rows) in zip(keys, add(torch.tensor(scored, dtype=torch.float64)).tolist(), strict=True):
            if key in self._n_scored:
                self._energies[key], self._n_scored[key] = torch.tensor([now, then]), int(n_rows)

    def conclude(self) -> None:
        """Decide which inputs are done, from what was compared and scored."""
        for key, share in _on_host(self._shares).items():
            if share >= self.rule.delta:
                self.done.setdefault(key, CONVERGED)
        self._shares = {}
        ready = [key for key, n_rows in self._n_scored.items() if n_rows >= ENOUGH_ROWS]
        for key, (now, then) in _on_host({key: self._energies[key] for key in ready}).items():
            gain = (now - then) / now if now > 0 else 0.0
            # A sample is noisy: two checks in a row must agree.
            if self.rule.min_gain is not None and max(gain, self.gains.get(key, 1.0)) < self.rule.min_gain:
                self.done.setdefault(key, ACCURATE)
            self.gains[key] = gain
            del self._n_scored[key], self._energies[key]


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the values of equally shaped tensors, waiting for the device once."""
    if not tensors:
        return {}
    device = next(iter(tensors.values())).device
    values = torch.stack([tensor.to(device) for tensor in tensors.values()]).tolist()
    return dict(zip(tensors, values, strict=True))
