"""What is exchanged where stopping rules are checked, in one process that counts it."""

from __future__ import annotations

import torch
from torch import nn

from evatune import StreamingPCA
from evatune.activations.layers.targets import TargetRules, find_targets
from evatune.activations.processes.exchange import Ranks
from evatune.activations.processes.lockstep import _Assembly
from evatune.activations.run import Measurement
from evatune.activations.stopping import StoppingMonitor
from evatune.settings import Stopping

WIDTH, K = 128, 8


class Alone(Ranks):
    """One process, which counts what it would send."""

    def __init__(self) -> None:
        self.rank, self.size, self.bytes_sent, self.device = 0, 1, 0, torch.device("cpu")

    def gather(self, tensor):
        self.bytes_sent += tensor.numel() * tensor.element_size()
        return [tensor.clone()]


def test_inputs_that_are_done_are_not_sent_to_be_checked_again():
    monitor = StoppingMonitor(Stopping(tau=1.0, min_gain=None), checks_per_doubling=1)
    targets = find_targets(
        nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("query", "key", "out")}), TargetRules()
    )
    measurement = Measurement(targets=targets, new_pca=StreamingPCA, n_components=K, monitor=monitor, alone=False)
    measurement.input_of = {"query": "query", "key": "query", "out": "out"}
    for key in ("query", "out"):
        measurement.pcas[key] = StreamingPCA(K, backend="exact").partial_fit(torch.randn(64, WIDTH))
    ranks = Alone()
    assembly = _Assembly(measurement, ranks)
    assert assembly.check(1) is None
    with_both = ranks.bytes_sent
    monitor.done["query"] = "converged"
    assert assembly.check(2) is None
    assert set(measurement.pcas) == {"query", "out"}  # what was merged before is still known
    assert ranks.bytes_sent - with_both < 0.6 * with_both
    monitor.done["out"] = "converged"
    assert assembly.check(4) == "batch cap"
