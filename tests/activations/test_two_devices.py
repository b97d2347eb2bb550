"""One model on two devices, as `device_map` spreads it; the second is one without hardware."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model
from tests import fake_device

import evatune

pytestmark = pytest.mark.on_cpu("it brings a second device of its own")


@pytest.fixture
def device():
    with fake_device.fake_device() as found:
        yield found


@pytest.mark.parametrize("options", [{}, {"state_device": "cpu"}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("backend", ["exact", "sketch"])
def test_a_model_on_two_devices_is_measured_as_on_one(build, batches_for, quiet, device, backend, options):
    batches = batches_for("llama", 4)
    given = quiet | {"backend": backend, "tau": 0.99, "min_gain": 1e-9} | options
    expected = evatune.measure(build("llama"), batches, **given)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": str(device)}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = dispatch_model(build("llama"), places, main_device="cpu", force_hooks=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "fake"}
    spectra = evatune.measure(model, batches, **given)
    assert list(spectra.inputs) == list(expected.inputs)
    for key, spectrum in spectra.inputs.items():
        torch.testing.assert_close(spectrum.singular_values, expected.inputs[key].singular_values, rtol=1e-3, atol=1e-4)
        assert spectrum.components.device.type == "cpu"
