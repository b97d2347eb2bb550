"""Linear layers: rows are the vectors that enter."""

from __future__ import annotations

from typing import Any

from torch import nn

from evatune.activations.layer_type import LayerType, whole_shape


class LinearType(LayerType):
    """Linear layers, the Conv1D of GPT-2, and the quantized linear layers of other libraries: rows are vectors."""

    is_linear = True

    def features(self, module: Any) -> tuple[int, int] | None:
        """Return (in_features, out_features)."""
        if isinstance(module, nn.Linear):
            return module.in_features, module.out_features
        kind = type(module).__name__
        if kind == "Conv1D" and hasattr(module, "nf"):
            return whole_shape(module.weight)  # type: ignore[return-value]
        widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        # Quantized layers (GPTQ, AWQ, HQQ, EETQ) are no subclasses of nn.Linear; PEFT too recognizes them by name.
        if "Linear" in kind and all(isinstance(width, int) for width in widths):
            return widths  # type: ignore[return-value]
        return None


LINEAR = LinearType()
"""The one instance, which all linear targets share; it has no state."""
