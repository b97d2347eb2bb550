"""What a run knows of the later plan: how many components of each input it would use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evatune.activations.input_state import InputState
from evatune.activations.layer_type import TargetModule
from evatune.allocation import ComponentVariances, allocate
from evatune.settings import Planning


class PlanAhead:
    """Plans from what a run has learned so far, with the same settings as the later plan.

    Args:
        planning: of the later plan.
        targets: all targets.
    """

    def __init__(self, planning: Planning, targets: Sequence[TargetModule]) -> None:
        self._planning = planning
        self._targets = {target.name: target for target in targets}
        self._variances: dict[str, ComponentVariances] = {}

    def __call__(self, input_of: Mapping[str, str], inputs: Mapping[str, InputState]) -> dict[str, int]:
        """Return how many components of each input a plan from its present state would use.

        Args:
            input_of: key of the input of every target that was reached.
            inputs: the states of the inputs by key.
        """
        for name, key in input_of.items():
            state, target = inputs[key], self._targets[name]
            # An input that is done changes little, and a snapshot of it costs a factorization.
            if state.pca.is_fitted and not (name in self._variances and state.reason is not None):
                snapshot = state.pca.snapshot()
                self._variances[name] = ComponentVariances(
                    explained_variance=snapshot.explained_variance.double().numpy(),
                    total_variance=snapshot.total_variance,
                    n_rows=snapshot.n_samples_seen,
                    in_features=target.in_features,
                    out_features=target.out_features,
                )
        needed: dict[str, int] = {}
        if self._variances:
            for name, rank in allocate(self._variances, settings=self._planning).ranks.items():
                key = input_of[name]
                needed[key] = max(needed.get(key, 0), rank)
        return needed
