"""What spreads a model over processes; how such models are measured is tested in `test_lockstep`."""

from __future__ import annotations

import importlib
import os
import signal

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import evatune
from evatune import EvaError
from evatune.activations.processes.sharded_models import sharding_of


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_an_ordinary_model_is_not_sharded():
    assert sharding_of(nn.Linear(2, 2)) is None


class Wrapped(FullyShardedDataParallel):
    """FSDP1 itself refuses to be made without an accelerator."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.inner = module


def test_fsdp1_is_refused():
    with pytest.raises(EvaError, match=r"FSDP1\) cannot be measured; .* torch\.distributed\.fsdp\.fully_shard"):
        evatune.measure(nn.Sequential(Wrapped(nn.Linear(8, 8))), [torch.randn(20, 8)], n_components=4, progress=False)


def test_in_one_process_a_held_interrupt_ends_measuring_after_the_pass(monkeypatch):
    module = importlib.import_module("evatune.activations.measure")  # the name in the package is the function
    monkeypatch.setattr(module, "sharding_of", lambda model: "some way")
    model, n_heads = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), []
    model.register_forward_hook(lambda module, args, output: n_heads.append(1))

    def batches():
        for number in range(5):
            if number == 2:
                interrupt()
            yield torch.randn(20, 8)

    spectra = evatune.measure(model, batches(), n_components=4, tau=None, min_gain=None, progress=False)
    assert spectra.settings["n_batches"] == 3 and {s.stopped for s in spectra.values()} == {"interrupted"}
    assert len(n_heads) == 3  # all passes went to the end


class ReadsItsPadding(nn.Module):
    """Sums up what came before, padding too."""

    def __init__(self):
        super().__init__()
        self.embedding, self.sees = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None):
        return self.sees(self.embedding(input_ids).cumsum(1))


@pytest.mark.parametrize("is_sharded", [False, True])
def test_padding_that_only_a_pass_in_parts_removes_is_said_where_there_can_be_none(monkeypatch, is_sharded):
    """All processes make the same number of passes, so no process can cut its batch by the lengths of its samples."""
    module = importlib.import_module("evatune.activations.measure")
    if is_sharded:
        monkeypatch.setattr(module, "sharding_of", lambda model: "some way")
    torch.manual_seed(0)
    ids, mask = torch.randint(1, 20, (4, 9)), torch.ones(4, 9).long()
    mask[:2, :4] = 0
    model, batches = ReadsItsPadding(), [{"input_ids": ids, "attention_mask": mask}]
    measured = {"n_components": 4, "tau": None, "min_gain": None, "progress": False}
    if not is_sharded:
        spectrum = evatune.measure(model, batches, **measured)["sees"]
        assert (spectrum.padding, spectrum.unsure_share, spectrum.n_rows) == ("removed", 0.0, 28)
        return
    with pytest.warns(evatune.EvaWarning, match=r"padding among the rows of 1 of 1 inputs .*'sees': 100% of its rows"):
        spectrum = evatune.measure(model, batches, **measured)["sees"]
    assert (spectrum.padding, spectrum.unsure_share, spectrum.n_rows) == ("unknown", 1.0, 36)
