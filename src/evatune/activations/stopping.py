"""When an input has been measured enough: the paper's rule on directions, and a rule on accuracy beside it.

The paper's rule (Section 3.2, Algorithm 1): each component has a cosine of at least τ with itself one update before.
Updates get smaller as rows accumulate, so every input meets this rule in the end, even if its components are wrong, and
meets it sooner with smaller batches. The second rule asks for what matters: how much more variance of unseen rows would
the next doubling of the data capture?

The last doubling answers this. At every check, two sets of components are compared on the rows since the previous
check, which neither set has seen: the components at the previous check, and those at half as many rows. Second moments
give the energy of these rows along any direction, so no row is kept. The variance that components miss because of too
little data is proportional to 1 / number of rows. As long as this rule expects a large gain from more data, the paper's
rule is not applied.

Shapes: d features, k components.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evatune.activations.input_state import InputState
from evatune.pca.subspace import component_cosines
from evatune.settings import Reason, Stopping

ENOUGH_ROWS = 2048
"""A gain is measured on at least this many unseen rows; fewer say little about later rows."""


def is_check(n_batches: int, *, per_doubling: int = 2) -> bool:
    """Tell whether the rules are applied after `n_batches`.

    Checks factorize matrices, so their number grows only with the logarithm of the data.

    Args:
        n_batches: how many batches were passed.
        per_doubling: 2 means after 2, 3, 4, 6, 8, 12, 16, 24, … batches; 1 means after 1, 2, 4, 8, …
    """
    power = 1 << max(n_batches.bit_length() - 1, 0)
    return n_batches >= per_doubling and n_batches in (power, power + (power // 2 if per_doubling == 2 else 0))


def is_compared(state: InputState, rule: Stopping) -> bool:
    """Tell whether components before and after a batch are to be compared, which costs factorizations."""
    gains_much = rule.min_gain is not None and (state.gain or 0.0) >= rule.min_gain
    return rule.tau is not None and state.reason is None and not gains_much


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check has found of one input; the tensors stay on their device until `decide` reads all of them."""

    share: Tensor | None = None
    """Share of the needed components that meet the paper's rule after the last batch, ()."""
    energies_2: Tensor | None = None
    """Energy of the rows since the last check, in the span of the components then and of those at half as many rows."""
    n_rows: int = 0
    """How many rows were added since the last check."""
    n_rows_before: int = 0
    """How many rows there were at the last check."""
    n_processes: int = 1
    """How many processes this finding is from, each with its own rows and components."""


def weigh(state: InputState, rule: Stopping, *, per_doubling: int) -> None:
    """Find what this check and the next one compare, while the factorization of a snapshot is at hand.

    Components that are compared for the last time are dropped, before those of the next inputs are found.
    """
    now = state.pca.snapshot()
    if state.before is not None and now.n_samples_seen > state.before.n_samples_seen:
        state.cosines = component_cosines(now.components, state.before.components)
        state.before = None
    if rule.min_gain is not None and len(state.checked) >= per_doubling:
        directions_kd = torch.cat(state.checked).to(now.components)
        state.weighed = state.pca.scatter_along(directions_kd).view(len(state.checked), -1)
        state.checked = state.checked[-per_doubling:]


def find(state: InputState, rule: Stopping, *, n_needed: int) -> Finding:
    """Return what both rules need to know about the components of an input; the plan needs `n_needed` of them."""
    share, now = None, state.pca.snapshot()
    if state.cosines is not None:
        cosines_k = state.cosines[:n_needed]
        share = (cosines_k >= (rule.tau or 0.0)).double().mean() if n_needed else cosines_k.new_ones(())
    if state.energies is None or state.weighed is None:
        return Finding(share=share)
    before_2k, n_rows_before = state.energies
    now_2k = torch.stack([state.weighed[-1], state.weighed[0]])
    return Finding(
        share=share,
        energies_2=(now_2k - before_2k.to(now_2k))[:, :n_needed].sum(dim=1),
        n_rows=now.n_samples_seen - n_rows_before,
        n_rows_before=n_rows_before,
    )


def decide(states: Mapping[str, InputState], findings: Mapping[str, Finding], rule: Stopping) -> None:
    """Apply both rules to what a check has found of these inputs, and note gains and reasons."""
    shares = read_together({key: found.share for key, found in findings.items() if found.share is not None})
    for key, share in shares.items():
        if share >= rule.delta:
            states[key].reason = Reason.CONVERGED
    ready = {key: found for key, found in findings.items() if found.n_rows >= ENOUGH_ROWS}
    energies = read_together({key: found.energies_2 for key, found in ready.items() if found.energies_2 is not None})
    for key, (now, then) in energies.items():
        state, found = states[key], ready[key]
        last = (now - then) / now if now > 0 else 0.0
        # The doubling up to the last check gained `last`. The next doubling starts from more rows and gains less in
        # proportion. The processes' states are merged at the end, so p processes have p times the rows and gain 1 / p.
        state.gain = last * found.n_rows_before / (2 * (found.n_rows_before + found.n_rows)) / found.n_processes
        if rule.min_gain is not None and state.gain < rule.min_gain:
            state.reason = state.reason or Reason.ACCURATE


def begin(state: InputState, rule: Stopping, *, per_doubling: int) -> None:
    """Keep the present components for later checks; for an input that is done, drop all that was kept."""
    weighed, state.weighed = state.weighed, None
    state.cosines = None
    if state.reason is not None:
        state.before, state.checked, state.energies = None, [], None
        return
    now = state.pca.snapshot()
    # `per_doubling` checks ago there were half as many rows.
    state.checked = [*state.checked[-per_doubling:], now.components.to(torch.bfloat16)]
    if weighed is not None:
        along_newest_k = now.singular_values.square().to(weighed, non_blocking=True)
        state.energies = torch.stack([along_newest_k, weighed[-per_doubling]]), now.n_samples_seen


def read_together(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the values of tensors of equal shape; the host waits for the device only once."""
    if not tensors:
        return {}
    device = next(iter(tensors.values())).device
    values = torch.stack([tensor.to(device) for tensor in tensors.values()]).tolist()
    return dict(zip(tensors, values, strict=True))
