"""From a model and batches to spectra; knows nothing of adapters."""

from evatune.activations.estimate import estimate
from evatune.activations.measure import measure
from evatune.activations.streaming import measure_from_disk

__all__ = ["estimate", "measure", "measure_from_disk"]
