"""Fused experts: the weights of all experts in one parameter, (experts, ...), multiplied by the rows routed to each.

Shapes: E experts, N positions, d input features of one expert.

Such a parameter is not a module with an input of its own, and implementations differ in how they gather rows. So the
module is run a second time on its input, without the positions that do not count, and every product with a slice of one
of its parameters is intercepted: the other factor is the input of that expert. One part for each expert (`StackedPCA`),
because PEFT gives all experts of a parameter one rank.

If an expert has fewer rows than components, the kind of parameter decides. Rows of a first projection are hidden
states, which all experts share: the expert takes its directions from the rows of all experts together. Rows of a later
projection lie in a space of each expert: it completes its own directions at random. In both cases only the variance of
its own rows counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from evatune.activations.layer_type import LayerType, Rows, running_autocast, whole_shape
from evatune.errors import EvaError
from evatune.pca import StreamingPCA
from evatune.pca.moving import moved
from evatune.pca.stacked import StackedPCA


class ExpertsType(LayerType):
    """One parameter of a module that holds the weights of all experts.

    Args:
        parameter_name: its name in the module.
    """

    def __init__(self, parameter_name: str) -> None:
        self.parameter_name = parameter_name
        self._are_hidden_states = False

    def features(self, module: Any) -> tuple[int, int] | None:
        """Return the widths of the inputs and of the outputs of all experts together, (E d, E o)."""
        shape = whole_shape(getattr(module, self.parameter_name))
        if len(shape) == 2:  # one matrix, such as a router's
            return shape[1], shape[0]
        if len(shape) != 3:
            return None
        n_experts, n_out, n_in = shape
        if getattr(module, "is_transposed", False):  # stored as x W and not as x Wᵀ, as PEFT reads it too
            n_in, n_out = n_out, n_in
        return n_experts * n_in, n_experts * n_out

    def entering(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments of the call, and the autocast that it runs under."""
        return args, kwargs, running_autocast(*args, *kwargs.values())

    def tensors(self, entering: Any) -> tuple[Tensor, ...]:
        """Return the tensors among the arguments."""
        args, kwargs, _ = entering
        return tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    def form(self, module: nn.Module) -> Hashable:
        """Return the parameter: each module routes rows to its experts in its own way."""
        return "experts", id(module), self.parameter_name

    def activations(self, module: Any, entering: Any) -> tuple[Tensor, ...]:
        """Return the hidden states of all positions, before they are routed."""
        return self.tensors(entering)[:1]

    def rows(self, module: Any, entering: Any, masks: Sequence[Tensor | None] = (None,)) -> Iterator[Rows]:
        """Yield the rows of every expert."""
        args, kwargs, autocast = entering
        args, kwargs = _counted(args, kwargs, masks[0])
        watched = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim in (2, 3)}
        with autocast, _written_out(module), _Products(watched) as products:
            module.forward(*args, **kwargs)
        found = products.rows.get(self.parameter_name)
        if not found and next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).numel():
            raise EvaError(
                f"is multiplied in a way that evatune cannot follow in {type(module).__name__}; "
                "leave it out of target_parameters."
            )
        self._are_hidden_states |= next(iter(products.rows), None) == self.parameter_name
        n_experts = self._n_experts(module)
        features = self.features(module)
        assert features is not None
        width = features[0] // n_experts
        for rows_nd in itertools.chain.from_iterable((found or {}).values()):
            if rows_nd.shape[1] != width:
                raise EvaError(
                    f"takes {width} features in each expert as it is stored, but {rows_nd.shape[1]} enter: set "
                    f"is_transposed=True on the {type(module).__name__} if it stores (experts, in, out), or leave it "
                    "out of target_parameters."
                )
        empty = watched[self.parameter_name].new_empty(0, width)
        yield [torch.cat((found or {}).get(number) or [empty]) for number in range(n_experts)]

    def new_pca(self, module: Any, n_components: int, make: Callable[[int], StreamingPCA]) -> StackedPCA:
        """Return a stack with one part for each expert."""
        n_experts = self._n_experts(module)
        features = self.features(module)
        assert features is not None
        widths = [features[0] // n_experts] * n_experts
        return StackedPCA(n_components, widths=widths, new_pca=make, alike=self._are_hidden_states)

    def _n_experts(self, module: Any) -> int:
        shape = whole_shape(getattr(module, self.parameter_name))
        return shape[0] if len(shape) == 3 else 1


_CASTS = {Tensor.to, Tensor.type, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.contiguous}
_PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}


class _Products(TorchFunctionMode):
    """Records the other factor of every product with a slice of a watched parameter.

    Attributes:
        rows: by parameter name, in the order of first use, the rows of each expert by its number.
    """

    def __init__(self, watched: dict[str, Tensor]) -> None:
        super().__init__()
        self.watched = watched
        self._copies: list[tuple[str, Tensor]] = []
        self.rows: dict[str, dict[int, list[Tensor]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) >= 2:
            self._keep(args[0], args[1])
        result = func(*args, **(kwargs or {}))
        if func in _CASTS:
            self._follow(args[0], result)
        return result

    def _follow(self, before: Tensor, after: Tensor) -> None:
        """Treat a copy of a parameter in another dtype, as routers multiply by, as the parameter itself."""
        self._copies += [(name, after) for name, parameter in self.watched.items() if before is parameter is not after]

    def _keep(self, rows: Tensor, weight: Tensor) -> None:
        for name, parameter in [*self.watched.items(), *self._copies]:
            if weight.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
                continue
            experts = self.rows.setdefault(name, {})
            if parameter.ndim == 2:
                if weight.numel() == parameter.numel():
                    experts.setdefault(0, []).append(rows.detach().reshape(-1, rows.shape[-1]))
                return
            first = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
            if weight.ndim == 2 and weight.numel() == parameter[0].numel():
                experts.setdefault(first, []).append(rows.detach().reshape(-1, rows.shape[-1]))
            elif weight.ndim == 3 and rows.ndim == 3 and len(rows) == len(weight):
                for number, rows_nd in enumerate(rows.detach()):
                    # Then all positions go through all experts, and rows of other experts are zero.
                    experts.setdefault(first + number, []).append(rows_nd[rows_nd.any(dim=1)])
            return


def _counted(
    args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments without the positions that do not count; the first one holds the hidden states."""
    hidden = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if hidden is None or mask is None:
        return args, kwargs
    kept_n = moved(mask.reshape(-1).nonzero().squeeze(1), hidden.device)
    leading, n_positions = hidden.shape[:-1], mask.numel()

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if value.shape[: len(leading)] == leading and len(leading) == 2:
            return value.flatten(0, 1)[kept_n].unsqueeze(0)
        return value[kept_n] if value.shape[0] == n_positions else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


@contextmanager
def _written_out(module: Any) -> Iterator[None]:
    """Make transformers run its plain code, one expert after the other, and not a fused kernel."""
    config: Any = getattr(module, "config", None)
    before = getattr(config, "_experts_implementation", None)
    if before is None:
        yield
        return
    try:
        config._experts_implementation = "eager"
        yield
    finally:
        config._experts_implementation = before
