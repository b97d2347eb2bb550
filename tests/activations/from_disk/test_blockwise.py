"""What a measurement from disk keeps and says of the whole model, though it sees one block at a time."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import FNetConfig, FNetModel, OPTConfig, OPTForCausalLM
from transformers.models.opt.modeling_opt import OPTDecoder

from evatune import EvaError, EvaWarning, measure, measure_from_disk


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A model with targets before, in and after its blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=64, word_embed_proj_dim=16, max_position_embeddings=64, **sizes)
    folder = tmp_path_factory.mktemp("opt")
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 64, (2, 6), generator=generator)} for _ in range(2)]


@pytest.mark.on_hardware("its weights look like quantized ones, which are not compared")
def test_the_same_weights_are_kept_as_by_measure(stored, batches):
    spectra = measure_from_disk(stored, batches, n_components=4, progress=False)
    model = OPTForCausalLM.from_pretrained(stored)
    expected = measure(model, batches, n_components=4, tau=None, min_gain=None, progress=False)
    assert spectra.weights == expected.weights
    parts = {name.split(".")[2] for name in spectra.weights}
    assert parts == {"project_in", "project_out", "layers"}


def test_each_doubt_is_said_once_for_all_blocks(stored, batches, monkeypatch):
    """24 rows are fewer than the 30 components asked for at first, and as many as a narrow input can keep."""
    with pytest.raises(EvaError, match="24 rows in 2 batches are fewer than the 30 components asked for"):
        measure_from_disk(stored, batches, n_components=30, progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monkeypatch.setattr("evatune.activations.results.SHOWN_ERROR", -1.0)
        measure_from_disk(stored, batches, n_components=4, progress=False)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, EvaWarning)]
    assert len(said) == 1
    assert said[0].startswith("the components of 10 of 10 inputs")


def test_padding_that_only_a_pass_in_parts_removes_is_said(tmp_path):
    """FNet mixes all positions, padding too; from disk, batches stay whole."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = FNetModel(FNetConfig(**sizes)).eval()
    model.save_pretrained(tmp_path)
    ids, mask = torch.randint(1, 64, (4, 9)), torch.ones(4, 9).long()
    mask[:2, 6:] = 0
    batches, measured = [{"input_ids": ids, "attention_mask": mask}], {"n_components": 4, "progress": False}
    measured["target_modules"] = ["intermediate.dense"]
    whole = measure(model, batches, tau=None, min_gain=None, **measured)
    assert {(spectrum.padding, spectrum.n_rows) for spectrum in whole.values()} == {("removed", 30)}
    with pytest.warns(EvaWarning, match="padding among the rows of 2 of 2 inputs cannot be recognized and counts"):
        parts = measure_from_disk(tmp_path, batches, **measured)
    assert {(spectrum.padding, spectrum.n_rows) for spectrum in parts.values()} == {("unknown", 36)}


def test_blocks_that_are_called_in_another_order_are_refused(stored, batches, monkeypatch):
    forward = OPTDecoder.forward

    def reversed_forward(self, *args, **kwargs):
        layers = self._modules.pop("layers")
        self.__dict__["layers"] = list(layers)[::-1]
        try:
            return forward(self, *args, **kwargs)
        finally:
            del self.__dict__["layers"]
            self._modules["layers"] = layers

    monkeypatch.setattr(OPTDecoder, "forward", reversed_forward)
    with pytest.raises(EvaError, match=r"OPT\w+ does not call its blocks in the order of its list"):
        measure_from_disk(stored, batches, n_components=4, progress=False)
