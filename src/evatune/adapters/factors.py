"""Where each kind of PEFT layer keeps the two factors of an adapter, A and B, and in which shape.

Shapes: r rank, d input features, o output features, V tokens, C channels, E experts. Everywhere else in evatune, A is a
matrix (r, d) and B a matrix (o, r); here it becomes what PEFT stores. A layer with several inputs and one rank (see
`evatune.pca.stacked`) has several pairs of factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper, _ConvNd
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from evatune.errors import EvaError


class Factors:
    """One pair of factors of one adapter on one layer; the methods of this class fit linear layers.

    Args:
        layer: the PEFT layer.
        adapter_name: the adapter.
    """

    saved_as = ("lora_A.weight", "lora_B.weight")
    """What A and B are called in a saved adapter, behind the layer's path."""
    sizes = ("out_features", "in_features")
    """Where the module of A notes the rank, and that of B."""

    def __init__(self, layer: Any, adapter_name: str) -> None:
        self.layer = layer
        self.adapter_name = adapter_name
        self.down: Any = layer.lora_A[adapter_name]
        self.up: Any = layer.lora_B[adapter_name]

    @property
    def width(self) -> int:
        """Features d of a row of A."""
        return self.down.in_features

    @property
    def n_outputs(self) -> int:
        """Rows o of B."""
        return self.up_weight.shape[0]

    @property
    def down_weight(self) -> Tensor:
        """A as PEFT stores it."""
        return self.down.weight

    @property
    def up_weight(self) -> Tensor:
        """B as PEFT stores it."""
        return self.up.weight

    def blocks(self) -> Sequence[Tensor]:
        """Return the matrices (r, d) that A consists of."""
        return [self.down_weight.flatten(1)]

    def write(self, A_rd: Tensor) -> None:
        """Store A, and B = 0 of the same rank; parameters stay the same objects where possible."""
        rank, old_up = len(A_rd), self.up_weight.shape
        assign(self.down, "weight", A_rd.reshape(rank, *self.down_weight.shape[1:]), device=self._device)
        assign(self.up, "weight", torch.zeros(old_up[0], rank, *old_up[2:]), device=self._device)
        if self.up.bias is not None:
            assign(self.up, "bias", torch.zeros(self.up.bias.shape), device=self._device)
        for module, size in zip((self.down, self.up), self.sizes, strict=True):
            setattr(module, size, rank)

    def padded(self, down: Tensor, up: Tensor, *, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """Return A and B as PEFT stores them, with zeros up to a larger rank and the scale in B."""
        return _grown(down, 0, rank), _grown(up * scale, 1, rank)

    @property
    def _device(self) -> torch.device:
        weight = getattr(self.layer, "weight", None)
        return working_device(self.layer, self.layer.in_proj_weight if weight is None else weight)


class ConvolutionFactors(Factors):
    """A is a convolution (r, C, *kernel) like the layer, B is a convolution of size 1."""

    sizes = ("out_channels", "in_channels")

    @property
    def width(self) -> int:
        """Channels times kernel size."""
        return prod(self.down_weight.shape[1:])

    def padded(self, down: Tensor, up: Tensor, *, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """Return A and B as PEFT stores them, with zeros up to a larger rank and the scale in B."""
        groups = self.layer.get_base_layer().groups
        if groups > 1 and rank != len(down):
            raise EvaError(
                f"a convolution with groups={groups} divides its rank {len(down)} among them and cannot be padded to "
                f"{rank}; give all layers one rank, or merge the adapter."
            )
        return super().padded(down, up, rank=rank, scale=scale)


class EmbeddingFactors(Factors):
    """A and B are parameters without a module, of shape (r, V) and (o, r)."""

    saved_as = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, layer: Any, adapter_name: str) -> None:
        self.layer = layer
        self.adapter_name = adapter_name
        self.down = layer.lora_embedding_A
        self.up = layer.lora_embedding_B

    @property
    def width(self) -> int:
        """Size of the vocabulary."""
        return self.down_weight.shape[1]

    @property
    def down_weight(self) -> Tensor:
        """A as PEFT stores it."""
        return self.down[self.adapter_name]

    @property
    def up_weight(self) -> Tensor:
        """B as PEFT stores it."""
        return self.up[self.adapter_name]

    def write(self, A_rd: Tensor) -> None:
        """Store A and B = 0."""
        assign(self.down, self.adapter_name, A_rd, device=self._device)
        assign(self.up, self.adapter_name, torch.zeros(self.up_weight.shape[0], len(A_rd)), device=self._device)


class ExpertFactors(Factors):
    """A holds the matrices of all experts, one below the other, (E r, d); B is (o, r E)."""

    @property
    def width(self) -> int:
        """Features of all experts together."""
        return self.layer.num_experts * self.down.in_features

    @property
    def n_outputs(self) -> int:
        """Rows of B of all experts together."""
        return self.layer.num_experts * self.up_weight.shape[0]

    def blocks(self) -> Sequence[Tensor]:
        """Return the A of each expert."""
        return self.down_weight.unflatten(0, (self.layer.num_experts, -1)).unbind(0)

    def write(self, A_rd: Tensor) -> None:
        """Store the pieces of a stacked A, (r, E d), and B = 0."""
        n_experts = self.layer.num_experts
        A_erd = A_rd.unflatten(1, (n_experts, -1)).transpose(0, 1) * n_experts**0.5
        super().write(A_erd.flatten(0, 1))

    def padded(self, down: Tensor, up: Tensor, *, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """Return A, padded expert by expert, and B, whose columns are ordered by rank and then by expert."""
        n_experts = self.layer.num_experts
        down_erd = down.unflatten(0, (n_experts, -1))
        return _grown(down_erd, 1, rank).flatten(0, 1), _grown(up * scale, 1, rank * n_experts)

    @property
    def _device(self) -> torch.device:
        return working_device(self.layer, self.layer.get_param())


def _grown(tensor: Tensor, dimension: int, size: int) -> Tensor:
    """Return a tensor padded with zeros at the end of one dimension, up to a size."""
    missing = list(tensor.shape)
    missing[dimension] = size - tensor.shape[dimension]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=dimension)


def working_device(layer: LoraLayer, weight: Tensor) -> torch.device:
    """Return the device on which a layer computes: that of its weight, or the one accelerate moves the weight to."""
    if not weight.is_meta:
        return weight.device
    hook = getattr(layer.get_base_layer(), "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return torch.device(next((device for h in hooks if (device := getattr(h, "execution_device", None))), "cpu"))


def factors_of(layer: LoraLayer, adapter_name: str) -> list[Factors]:
    """Return the pairs of factors of an adapter on a layer, in the order in which their inputs are stacked."""
    if isinstance(layer, Embedding):
        return [EmbeddingFactors(layer, adapter_name)]
    if isinstance(layer, _ConvNd):
        return [ConvolutionFactors(layer, adapter_name)]
    if isinstance(layer, ParamWrapper):
        return [ExpertFactors(layer, adapter_name)]
    return [Factors(part, adapter_name) for part in layers_of(layer)]


def layers_of(layer: LoraLayer) -> list[Any]:
    """Return the layer, and the layers that PEFT adapts together with it."""
    return [layer, layer.base_layer.out_proj] if isinstance(layer, MultiheadAttention) else [layer]


def is_computed(module: nn.Module) -> bool:
    """Tell whether a module's weight is computed from other parameters in every call, as by `weight_norm`."""
    has_weight = isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return is_parametrized(module) or (has_weight and "weight" not in module._parameters)


COMPUTED = (
    "the weight of {name!r} is computed anew in every call (weight_norm or another parametrization), and PEFT cannot "
    "merge an adapter into it; call torch.nn.utils.parametrize.remove_parametrizations first, or leave it out with "
    "exclude_modules."
)
"""The error message for such a module."""


def check_form(name: str, layer: LoraLayer) -> None:
    """Check that PEFT's adapter on a layer can start from components of the layer's input.

    Raises:
        EvaError: it cannot.
    """
    base: Any = layer.get_base_layer()
    if is_computed(base):
        raise EvaError(COMPUTED.format(name=name))
    if isinstance(layer, _ConvNd):
        if base.groups > 1:
            raise EvaError(
                f"{name!r} is a convolution with groups={base.groups}, where PEFT's A sees all groups at once and "
                "its rank must be a multiple of them; leave this module out with exclude_modules."
            )
        if any(step != 1 for step in base.dilation):
            raise EvaError(
                f"{name!r} is a convolution with dilation={base.dilation}, which PEFT's adapter does not have; "
                "leave this module out with exclude_modules."
            )
    if isinstance(layer, ParamWrapper) and type(base).__name__ == "Conv1D":
        raise EvaError(
            f"{name!r} is stored as (in_features, out_features), and PEFT confuses the two; "
            "name its module in target_modules instead of target_parameters."
        )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into a model in place of the one of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def assign(owner: Any, name: str, value: Tensor, *, device: torch.device) -> None:
    """Put `value` into the parameter `name` of a module, whatever shape it had."""
    old = getattr(owner, name)
    if old.is_meta:  # made with low_cpu_mem_usage=True: no memory is allocated yet
        setattr(owner, name, nn.Parameter(value.to(device, old.dtype), requires_grad=old.requires_grad))
    else:
        old.data = value.to(old.device, old.dtype).contiguous()
        old.grad = None
