"""When an input has been measured enough: the paper's rule on directions, and a rule on accuracy beside it.

The paper's rule (Section 3.2, Algorithm 1) is that each component has cosine τ with itself one update before. Steps
shrink as rows accumulate, so it is met in the end whatever the error is. The second rule asks for what matters: how
much more variance of rows not seen yet would the next doubling of the data capture?

That is foretold from the last one. At every check, the components of the check before and those of half the data by
then are compared on the rows that came since, which neither has seen; second moments tell the energy of these rows
along any direction, so no row is looked at twice. What components miss for want of data falls with one over the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evatune.pca import AnyPCA
from evatune.pca.subspace import component_cosines
from evatune.settings import Stopping

CONVERGED = "converged"
ACCURATE = "accurate"
BATCH_CAP = "batch cap"
EXHAUSTED = "data exhausted"
INTERRUPTED = "interrupted"

ENOUGH_ROWS = 2048
"""On how many unseen rows a gain is measured at least; fewer say little about rows to come."""


def is_check(n_batches: int) -> bool:
    """Tell whether rules are checked after `n_batches`: 2, 3, 4, 6, 8, 12, 16, 24, 32, …

    Checks factorize, so their number should grow with the logarithm of the data only.
    """
    power = 1 << max(n_batches.bit_length() - 1, 0)
    return n_batches >= 2 and n_batches in (power, power + power // 2)


@dataclass(frozen=True, kw_only=True)
class _Unseen:
    """What rows after a check have brought."""

    energies_2: Tensor
    """Their energy in the span of the check's components, and of those of half the data by then, (2,)."""
    n_rows: int
    n_rows_before: int
    """How many rows there were at the check."""


class StoppingMonitor:
    """Follows every input through the checks and remembers why each is done.

    At a check, the rows since the last one are scored (`score_unseen`), the components are compared with those before
    the last batch (`compare_update`), `conclude` decides for all inputs at once, until when everything stays on its
    device, and those that are not done begin anew (`begin_check`).

    Attributes:
        done: reason by input key, once there is one.
        gains: by input key, how much the next doubling of the data would gain, as far as the last check tells, as a
            share of the variance captured now.
    """

    def __init__(self, rule: Stopping, *, checks_per_doubling: int = 2) -> None:
        self.rule = rule
        self.checks_per_doubling = checks_per_doubling
        self.done: dict[str, str] = {}
        self.gains: dict[str, float] = {}
        self._history: dict[str, list[Tensor]] = {}
        self._before: dict[str, tuple[Tensor, int]] = {}
        self._unseen: dict[str, _Unseen] = {}
        self._shares: dict[str, Tensor] = {}

    def begin_check(self, key: str, components_kd: Tensor, pca: AnyPCA | None) -> None:
        """Take the components of an input as they are now.

        Args:
            key: the input.
            components_kd: its components, (k, d); with several processes, of the rows of all.
            pca: what this process has learned of it, if it has seen any row.
        """
        # With checks at 2, 3, 4, 6, 8, 12, … batches, there were half the rows two checks ago.
        history = self._history[key] = [*self._history.get(key, [])[-self.checks_per_doubling :], components_kd]
        if self.rule.min_gain is not None and len(history) > self.checks_per_doubling:
            self._before[key] = self._energies(key, pca)

    def score_unseen(self, key: str, pca: AnyPCA | None, *, n_needed: int) -> None:
        """Score the rows since the last check with the components of then and of half the data by then.

        Args:
            key: the input.
            pca: what has been learned of it by now.
            n_needed: how many components the present plan needs.
        """
        if key in self._before:
            before_2k, n_rows_before = self._before[key]
            now_2k, n_rows = self._energies(key, pca)
            gained_2k = now_2k - before_2k.to(now_2k)
            self._unseen[key] = _Unseen(
                energies_2=gained_2k[:, :n_needed].sum(dim=1),
                n_rows=n_rows - n_rows_before,
                n_rows_before=n_rows_before,
            )

    def _energies(self, key: str, pca: AnyPCA | None) -> tuple[Tensor, int]:
        """Return the energy of the rows so far along the last components and those of half the data then, (2, k).

        And how many rows that are.
        """
        directions_kd = torch.cat([self._history[key][-1], self._history[key][0]])
        if pca is None or not pca.is_fitted:
            return directions_kd.new_zeros(2, len(directions_kd) // 2), 0
        return pca.scatter_along(directions_kd).view(2, -1), pca.n_samples_seen_

    def compares(self, key: str) -> bool:
        """Tell whether the components before and after a batch are to be compared, which costs factorizations."""
        # Where more data are known to gain much, components that turn slowly say only that batches are small.
        gains_much = self.rule.min_gain is not None and self.gains.get(key, 0.0) >= self.rule.min_gain
        return self.rule.tau is not None and key not in self.done and not gains_much

    def compare_update(self, key: str, components_kd: Tensor, before_kd: Tensor, *, n_needed: int) -> None:
        """Compare the components of an input, (k, d), with those one update before."""
        cosines_k = component_cosines(components_kd[:n_needed], before_kd[:n_needed])
        converged_k = cosines_k >= (self.rule.tau or 0.0)
        self._shares[key] = converged_k.double().mean() if n_needed else cosines_k.new_ones(())

    def last_components(self, key: str) -> Tensor | None:
        """Return the components of an input at the last check, (k, d)."""
        return self._history[key][-1] if key in self._history else None

    def pool(
        self, own: Mapping[str, AnyPCA], *, n_needed: Callable[[str], int], add: Callable[[Tensor], Tensor]
    ) -> None:
        """Score the rows that all processes have seen since the last check.

        Args:
            own: what this process has learned.
            n_needed: tells of an input how many components the present plan needs.
            add: sums a tensor over the processes; all have had the same checks of the same inputs.
        """
        keys = [key for key in self._before if key not in self.done]
        if not keys:
            return
        for key in keys:
            self.score_unseen(key, own.get(key), n_needed=n_needed(key))
        unseen = [self._unseen[key] for key in keys]
        scores = [(*rows.energies_2.tolist(), rows.n_rows, rows.n_rows_before) for rows in unseen]
        for key, (now, then, n_rows, n_rows_before) in zip(
            keys, add(torch.tensor(scores, dtype=torch.float64)).tolist(), strict=True
        ):
            self._unseen[key] = _Unseen(
                energies_2=torch.tensor([now, then]), n_rows=int(n_rows), n_rows_before=int(n_rows_before)
            )

    def conclude(self) -> None:
        """Decide which inputs are done, from what was compared and scored."""
        for key, share in _on_host(self._shares).items():
            if share >= self.rule.delta:
                self.done.setdefault(key, CONVERGED)
        ready = {key: unseen for key, unseen in self._unseen.items() if unseen.n_rows >= ENOUGH_ROWS}
        energies = _on_host({key: unseen.energies_2 for key, unseen in ready.items()})
        for key, unseen in ready.items():
            now, then = energies[key]
            last = (now - then) / now if now > 0 else 0.0
            # The doubling up to the last check gained this much; the next one, from now on, so much less.
            gain = last * unseen.n_rows_before / (2 * (unseen.n_rows_before + unseen.n_rows))
            if self.rule.min_gain is not None and gain < self.rule.min_gain:
                self.done.setdefault(key, ACCURATE)
            self.gains[key] = gain
        self._shares, self._unseen = {}, {}
        for key in self.done:  # what is not looked at again need not be kept
            self._history.pop(key, None)
            self._before.pop(key, None)


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the values of equally shaped tensors, waiting for the device once."""
    if not tensors:
        return {}
    device = next(iter(tensors.values())).device
    values = torch.stack([tensor.to(device) for tensor in tensors.values()]).tolist()
    return dict(zip(tensors, values, strict=True))
