"""From a model and batches to spectra; knows nothing of adapters."""

from evatune.activations.measure import measure

__all__ = ["measure"]
