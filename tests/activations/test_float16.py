"""Models in float16, and float16 by autocast: what enters the targets is measured in wider numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evatune import measure


def padding_left_out(name, batch):
    return batch["attention_mask"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_in_float16_is_measured(build, batches_for, observe, quiet, kind):
    model, batches = build(kind).half(), batches_for(kind)
    spectra = measure(model, batches, **quiet)
    seen = observe(model, batches, spectra, select=padding_left_out)
    for name in spectra:
        assert spectra[name].components.dtype == torch.float32
        seen.check(name, spectra[name], n_compared=1)


def test_autocast_in_float16_is_measured(build, batches_for, observe, quiet):
    model, batches = build("llama"), batches_for("llama")
    spectra = measure(model, batches, dtype="float16", **quiet | {"tau": 0.99, "min_gain": 0.01})

    def forward(model, batch):
        with torch.autocast(batch["input_ids"].device.type, torch.float16):
            return model(**batch)

    seen = observe(model, batches, spectra, select=padding_left_out, forward=forward)
    for name in spectra:
        seen.check(name, spectra[name], n_compared=1)


@pytest.mark.parametrize("largest", [3e4, 1e-6])
def test_activations_at_the_ends_of_float16(observe, quiet, largest):
    model = nn.Sequential(nn.Linear(24, 8)).half()
    x = torch.randn(3, 100, 24, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 1, 24)
    batches = list((x * (largest / x.abs().max())).half())
    spectra = measure(model, batches, target_modules=["0"], **quiet)
    seen = observe(model, batches, ["0"], forward=lambda model, batch: model(batch))
    spectrum, truth = spectra["0"], torch.tensor(seen.matrix("0")).std(dim=0).square().sum()
    assert spectrum.total_variance == pytest.approx(float(truth), rel=1e-4)
    variances = torch.linalg.svdvals(torch.tensor(seen.matrix("0") - seen.matrix("0").mean(axis=0))).square() / 299
    torch.testing.assert_close(spectrum.explained_variance.double(), variances[:6], rtol=1e-3, atol=0)
