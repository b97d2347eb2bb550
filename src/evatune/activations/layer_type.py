"""Layer types: how the input of each kind of layer becomes the rows that its low-rank update multiplies.

Shapes: n rows, d features.

A new layer type is one file in `evatune.activations.layers` with one subclass of `LayerType`, and one entry in
`evatune.activations.layers.targets.LAYER_TYPES`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evatune.activations.rows import select
from evatune.errors import EvaError
from evatune.pca import AnyPCA, StreamingPCA

EXPERT = re.compile(r"(?P<group>(?:.*\.)?[^.]*expert[^.\d]*)\.?(?P<number>\d+)(?:\.(?P<part>.+))?", flags=re.IGNORECASE)
"""Names of targets that are a part of one expert of several: "...experts.3.down_proj"."""

Rows = Any
"""What the PCA of a layer type takes: a matrix (n, d), token numbers (n,), or one matrix for each part."""


class LayerType(ABC):
    """How one kind of layer is measured; the methods of this class fit layers that multiply vectors by one matrix."""

    is_linear = False
    """Whether a layer of this kind is one linear map and nothing else."""

    @abstractmethod
    def features(self, module: Any) -> tuple[int, int] | None:
        """Return the widths (in, out) of what a low-rank update of this module multiplies, or None for other kinds.

        Raises:
            EvaError: the module is of this kind, but of a form that cannot be measured.
        """

    def entering(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what enters the module, from the arguments of its call."""
        return args[0] if args else next(iter(kwargs.values()))

    def tensors(self, entering: Any) -> tuple[Tensor, ...]:
        """Return the tensors by which targets with the same input are recognized."""
        return (entering,) if isinstance(entering, Tensor) else ()

    def form(self, module: nn.Module) -> Hashable:
        """Return what else decides the rows, beside the tensors; targets share an input if both are equal."""
        return None

    def activations(self, module: nn.Module, entering: Any) -> tuple[Tensor, ...]:
        """Return what entered as activations, (..., features): their leading dimensions are positions.

        Raises:
            EvaError: what entered has another shape than the module takes.
        """
        width = self.features(module)
        assert width is not None
        check_width(entering, width[0])
        return (entering,)

    def rows(self, module: nn.Module, entering: Any, masks: Sequence[Tensor | None] = (None,)) -> Iterator[Rows]:
        """Yield the rows of one call that count, in pieces that fit in memory.

        Args:
            module: the module.
            entering: what entered it.
            masks: which positions count, for each of `activations`; None means all.

        Raises:
            EvaError: what entered has another shape than the module takes.
        """
        (activation,) = self.activations(module, entering)
        yield select(activation, masks[0])

    def new_pca(self, module: nn.Module, n_components: int, make: Callable[[int], StreamingPCA]) -> AnyPCA:
        """Return the PCA of this module's rows; `make` makes a `StreamingPCA` with the given number of components."""
        width = self.features(module)
        assert width is not None
        return make(min(n_components, width[0]))


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter as it is in use; between uses, DeepSpeed ZeRO-3 leaves an empty tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def running_autocast(*arguments: Any) -> torch.autocast:
    """Return a copy of the active autocast for the device of the first tensor, to compute something again under it."""
    device_type = next((value.device.type for value in arguments if isinstance(value, Tensor)), "cpu")
    return torch.autocast(
        device_type, torch.get_autocast_dtype(device_type), enabled=torch.is_autocast_enabled(device_type)
    )


def check_width(entering: Any, n_features: int) -> None:
    """Check that what entered is a tensor whose last dimension has `n_features` features.

    Raises:
        EvaError: it is not.
    """
    if not isinstance(entering, Tensor) or not entering.ndim or entering.shape[-1] != n_features:
        raise EvaError(f"takes {n_features} features, but its input is {described(entering)}.")


def described(entering: Any) -> str:
    """Return the shape of a tensor, the type of anything else."""
    return str(tuple(entering.shape)) if isinstance(entering, Tensor) else type(entering).__name__


@dataclass(frozen=True, kw_only=True)
class TargetModule:
    """A target and the module whose input is measured."""

    name: str
    """Name in the base model, without the prefixes that PEFT and compilation add."""
    module: nn.Module
    """The module to hook: the target itself, or the base layer inside a PEFT layer."""
    in_features: int
    """Width of its input."""
    out_features: int
    """Width of its output."""
    layer: LayerType
    """How its input becomes rows."""
    parameter: str | None = None
    """Name of the parameter in that module, if the target is this parameter and not the module itself."""
