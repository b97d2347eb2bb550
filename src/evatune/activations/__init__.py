"""From a model and batches to spectra; knows nothing of adapters."""

from evatune.activations.estimate import estimate
from evatune.activations.from_disk.measure import measure_from_disk
from evatune.activations.measure import measure

__all__ = ["estimate", "measure", "measure_from_disk"]
