"""What one training step takes, from a model without values: bytes that are alive at once, and operations.

A batch without values goes through the model and back. Every tensor of the pass is fake: it has a shape, a dtype and a
size, and takes no memory. What is alive at the same time is added up, as an allocator would.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from evatune.hardware import autocast


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One pass forward and back."""

    peak_bytes: int
    """Largest number of bytes alive at once beside the weights: activations, gradients, copies."""
    flops: int
    """Operations of all matrix products; a multiplication and its addition count as two."""


class AliveBytes(TorchDispatchMode):
    """Adds up the bytes of the storages that operations make, for as long as anything holds them.

    Args:
        known: tensors that were there before and do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known: set[int] = set()
        for tensor in known:
            self._add(tensor.untyped_storage(), 0)

    def _add(self, storage: torch.UntypedStorage, n_bytes: int) -> None:
        self._known.add(id(storage))
        self.now += n_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, id(storage), n_bytes)

    def _remove(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self.now -= n_bytes

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        kwargs = kwargs or {}
        made = operation(*args, **kwargs)
        if (count := flop_registry.get(operation.overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known:
                    self._add(storage, storage.nbytes())
        return made


def step_cost(
    model: nn.Module,
    batch: Callable[[], Mapping[str, Tensor]],
    *,
    bf16: bool = False,
    checkpoint: Callable[[nn.Module], None] | None = None,
) -> StepCost:
    """Follow a batch through a model and back.

    Args:
        model: on the meta device; its parameters and buffers are replaced by fake ones.
        batch: makes a batch with labels; it is called where tensors take no memory.
        bf16: compute under bfloat16 autocast.
        checkpoint: switches on gradient checkpointing.

    Returns:
        What it took. Attention counts as a fused kernel, as PyTorch has it on accelerators and processors.

    Raises:
        Exception: of any kind, if the model reads values of tensors on its way.
    """
    with FakeTensorMode():
        _make_fake(model)
        if checkpoint is not None:
            checkpoint(model)
        model.train()
        inputs = dict(batch())
        counted = AliveBytes([*model.parameters(), *model.buffers(), *inputs.values()])
        with counted, autocast(torch.device("cpu"), "bfloat16" if bf16 else None):
            model(**inputs).loss.backward()
    return StepCost(peak_bytes=counted.peak, flops=counted.flops)


def _make_fake(model: nn.Module) -> None:
    """Replace parameters and buffers by fake ones on the processor; what was shared stays shared."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = made.setdefault(id(parameter), nn.Parameter(fake(parameter), parameter.requires_grad))
                module._parameters[name] = new  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), fake(buffer))
