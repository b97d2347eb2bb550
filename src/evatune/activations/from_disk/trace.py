"""Follow a batch without values through a model without weights: shared inputs and rows are known then.

Nothing is computed and no memory is taken: tensors are fake or on the meta device, and have only shapes. Some models
read values of tensors on the way; if a model fails with both kinds of tensors, a batch cannot be followed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from evatune.activations.layers.targets import TargetModule, TargetRules, find_targets


class Trace:
    """What a batch without values shows about a model.

    Attributes:
        first_of: for every target, the first one that got the same input.
        n_rows: rows that entered a target.
        n_hidden: elements of the first argument of every element of a `ModuleList`.
    """

    def __init__(self) -> None:
        self.first_of: dict[str, str] = {}
        self.n_rows: dict[str, int] = {}
        self.n_hidden: dict[str, int] = {}
        self._owners: dict[Any, str] = {}
        self._kept: list[Any] = []

    def run(self, model: Any, rules: TargetRules, inputs: dict[str, Tensor]) -> Trace:
        """Pass the batch."""
        for target in find_targets(model, rules):
            target.module.register_forward_pre_hook(self._target_hook(target), with_kwargs=True)
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList):
                for number, block in module.named_children():
                    block.register_forward_pre_hook(self._block_hook(f"{name}.{number}"), with_kwargs=True)
        options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
        with torch.no_grad():
            model(**inputs, **options)
        self._kept.clear()
        return self

    def _target_hook(self, target: TargetModule) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering = target.layer.entering(module, args, kwargs)
            tensors = target.layer.tensors(entering)
            # Tensors without values have no address, so their ids identify them; kept alive, ids stay unique.
            self._kept.append(tensors)
            key = (target.layer.form(module), *map(id, tensors))
            self.first_of.setdefault(target.name, self._owners.setdefault(key, target.name))
            try:
                pieces = target.layer.rows(module, entering)
                n_rows = sum(len(piece) if isinstance(piece, Tensor) else max(map(len, piece)) for piece in pieces)
            except Exception:  # which rows reach an expert depends on values: assume all of them
                hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                n_rows = hidden.shape[:-1].numel()
            self.n_rows[target.name] = self.n_rows.get(target.name, 0) + n_rows

        return hook

    def _block_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if isinstance(hidden, Tensor):
                self.n_hidden[name] = hidden.numel()

        return hook


def follow(
    build: Callable[..., nn.Module], rules: TargetRules, dtype: torch.dtype | None, *, batch_size: int, length: int
) -> Trace | None:
    """Follow one batch.

    Args:
        build: makes the model, of a dtype and in a context.
        rules: which modules are targets.
        dtype: of the model.
        batch_size: samples in the batch.
        length: tokens of a sample.

    Returns:
        What it showed, or None if the model asks for values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    # The number of rows does not depend on the dtype, and some fused experts can be followed in one dtype only.
    for kind, tried in (("cpu", dtype), ("meta", dtype), ("cpu", torch.bfloat16)):
        context: AbstractContextManager[Any] = FakeTensorMode() if kind == "cpu" else torch.device("meta")
        try:
            with context, _failing_quietly():
                model = build(dtype=tried, context=context).requires_grad_(False)
                return Trace().run(model, rules, _inputs(model, kind, batch_size=batch_size, length=length))
        except Exception:  # a model can fail in any way if values are missing
            continue
    return None


@contextmanager
def _failing_quietly() -> Iterator[None]:
    """Keep torch from reporting what fails without values, since another attempt follows."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield
    finally:
        logger.disabled = before


def _inputs(model: Any, device: str, *, batch_size: int, length: int) -> dict[str, Tensor]:
    config = model.config
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.empty(shape, device=device, dtype=next(model.parameters()).dtype)}
    tokens = torch.zeros(batch_size, length, dtype=torch.long, device=device)
    return {"input_ids": tokens} | (
        {"decoder_input_ids": tokens} if getattr(config, "is_encoder_decoder", False) else {}
    )
