"""`nn.MultiheadAttention`: what enters its packed projections, and what enters its output projection.

Shapes: B samples, T positions, E features.

Neither projection is called as a module: both happen inside one function. PEFT adapts them together, with one rank: `A`
of the packed projections multiplies query, key and value, `A` of the output projection multiplies the heads' output. So
the layer has two parts (`StackedPCA`):

- the rows of query, key and value; of only one of them where all three are the same tensor;
- the heads' output, which is the module's output with the identity in place of the output projection. It is computed
  once more for this, at the cost of one attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from evatune.activations.layer_type import LayerType, Rows, check_width, running_autocast
from evatune.activations.rows import select
from evatune.errors import EvaError
from evatune.pca import StreamingPCA
from evatune.pca.stacked import StackedPCA

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


class AttentionType(LayerType):
    """`nn.MultiheadAttention` with equal widths of query, key and value."""

    def features(self, module: Any) -> tuple[int, int] | None:
        """Return the widths of both parts together: (2 E, 3 E + E)."""
        if not isinstance(module, nn.MultiheadAttention):
            return None
        if module.in_proj_weight is None:
            raise EvaError(
                f"an nn.MultiheadAttention whose kdim={module.kdim} or vdim={module.vdim} is not its "
                f"embed_dim={module.embed_dim} has no packed projection; leave it out with exclude_modules."
            )
        return 2 * module.embed_dim, 4 * module.embed_dim

    def entering(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments by name, and the autocast that the call runs under."""
        arguments = dict(_SIGNATURE.bind(module, *args, **kwargs).arguments)
        del arguments["self"]
        return arguments, running_autocast(*arguments.values())

    def tensors(self, entering: Any) -> tuple[Tensor, ...]:
        """Return query, key and value."""
        return tuple(entering[0][name] for name in ("query", "key", "value"))

    def form(self, module: nn.Module) -> Hashable:
        """Return the module: no other module computes the same heads' output."""
        return "attention", id(module)

    def activations(self, module: Any, entering: Any) -> tuple[Tensor, ...]:
        """Return query, key and value, (B, T, E) each; only one of them where all three are the same tensor."""
        query, key, value = self.tensors(entering)
        for tensor in (query, key, value):
            check_width(tensor, module.embed_dim)
        entered = (query,) if query is key is value else (query, key, value)
        return tuple(_batch_first(module, tensor) for tensor in entered)

    def rows(self, module: Any, entering: Any, masks: Sequence[Tensor | None] = (None,) * 3) -> Iterator[Rows]:
        """Yield the rows of both parts; what the call itself masks as padding does not count either."""
        query, *others = self.activations(module, entering)
        arguments, autocast = entering
        unpadded_bt = _unpadded(arguments.get("key_padding_mask"))
        query_masks = (masks[0], None if others else unpadded_bt)
        entered = [select(query, *query_masks)]
        entered += [select(other, mask, unpadded_bt) for other, mask in zip(others, masks[1:], strict=False)]
        with autocast:
            given = _batch_first(module, _heads_output(module, arguments))
        yield [torch.cat(entered), select(given, *query_masks)]

    def new_pca(self, module: Any, n_components: int, make: Callable[[int], StreamingPCA]) -> StackedPCA:
        """Return a stack of two parts."""
        return StackedPCA(n_components, widths=[module.embed_dim] * 2, new_pca=make)


def _batch_first(module: Any, tensor: Tensor) -> Tensor:
    if tensor.ndim == 2:
        return tensor.unsqueeze(0)
    return tensor if module.batch_first else tensor.transpose(0, 1)


class _WithoutHooks(nn.Module):
    """Calls the forward function of a module, past the hooks on it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **arguments: Any) -> Any:
        return self.module.forward(**arguments)


def _heads_output(module: Any, arguments: dict[str, Any]) -> Tensor:
    """Return what enters the output projection, in the layout of the query."""
    projection = module.out_proj
    path = "module.out_proj."
    while hasattr(projection, "base_layer"):  # PEFT wraps it together with the module
        projection, path = projection.base_layer, path + "base_layer."
    weight = projection.weight
    neutral = {path + "weight": torch.eye(module.embed_dim, dtype=weight.dtype, device=weight.device)}
    if projection.bias is not None:
        neutral[path + "bias"] = torch.zeros_like(projection.bias)
    return functional_call(_WithoutHooks(module), neutral, kwargs=arguments | {"need_weights": False})[0]


def _unpadded(key_padding_mask: Any) -> Tensor | None:
    """Return which keys are attended to, (B, T), from a boolean or an additive mask."""
    if not isinstance(key_padding_mask, Tensor):
        return None
    mask_bt = key_padding_mask == 0 if key_padding_mask.is_floating_point() else ~key_padding_mask.bool()
    return mask_bt if mask_bt.ndim == 2 else mask_bt.unsqueeze(0)
