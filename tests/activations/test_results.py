"""What is said of inputs that got too few rows, or none that count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evatune import EvaError, EvaWarning, Spectra, measure
from evatune.settings import Reason

D = 12
MASKED = {"text": None, "pooled": None, "image": torch.zeros(2, 9, dtype=torch.bool)}


class Pooled(nn.Module):
    """A layer on all positions, one on their mean, and one that stands for an image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text, self.pooled, self.image = nn.Linear(D, D), nn.Linear(D, 4), nn.Linear(D, 4)

    def forward(self, x):
        hidden = self.text(x)
        return self.pooled(hidden.mean(1)), self.image(2 * hidden)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(2, 9, D, generator=generator)} for _ in range(3)]


MEASURED = {"target_modules": ["text", "pooled", "image"], "progress": False}


def test_an_input_with_fewer_rows_than_components_is_named_and_marked(batches, tmp_path):
    message = "1 of 3 inputs got fewer rows than components in 3 batches, the first is 'pooled' with 6 rows for 8"
    with pytest.warns(EvaWarning, match=message) as caught:
        spectra = measure(Pooled(), batches, rank=4, **MEASURED)
    assert len(caught) == 1
    again = Spectra.load(spectra.save(tmp_path / "spectra"))
    for found in (spectra, again):
        reasons = {name: found[name].stopped for name in found}
        assert reasons["pooled"] is Reason.FEWER_ROWS and Reason.FEWER_ROWS not in (reasons["text"], reasons["image"])
    assert "last components are arbitrary" in spectra.overview()
    assert spectra["pooled"].n_rows == 6
    assert spectra["pooled"].components.shape == (8, D)
    # Six centred rows have five directions; an adapter gets no arbitrary one as long as there are others.
    assert spectra.plan(4, 2.0).ranks["pooled"] <= 5


def test_as_many_rows_as_components_are_enough(batches):
    spectra = measure(Pooled(), batches, rank=3, **MEASURED)
    assert spectra["pooled"].n_rows == spectra["pooled"].components.shape[0] == 6
    assert spectra["pooled"].stopped is not Reason.FEWER_ROWS


def test_an_interruption_stays_the_reason(batches):
    def interrupted():
        yield from batches
        raise KeyboardInterrupt

    with pytest.warns(EvaWarning, match="fewer rows than components"):
        spectra = measure(Pooled(), interrupted(), rank=4, **MEASURED)
    assert {spectra[name].stopped for name in spectra} == {Reason.INTERRUPTED}


def test_an_input_whose_rows_are_all_masked_counts_as_unreached(batches):
    message = "1 of 3 targets got no input or only rows that are masked in 3 batches .* the first is 'image'"
    with pytest.warns(EvaWarning, match=message):
        spectra = measure(Pooled(), batches, rank=3, row_mask=lambda batch: MASKED, **MEASURED)
    assert spectra.unreached == ("image",)
    assert list(spectra) == ["text", "pooled"] and list(spectra.inputs) == ["text", "pooled"]


def test_targets_that_no_batch_reaches_at_all_are_an_error(batches):
    model = Pooled()
    model.other = nn.Linear(D, D)
    with pytest.raises(EvaError, match="none of the targets got an input in 3 batches; choose others"):
        measure(model, batches, rank=3, **MEASURED | {"target_modules": ["other"]})
