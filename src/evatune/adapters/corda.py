"""CorDA's start: the covariance of each target's input, one example at a time, decomposed by PEFT (arXiv:2406.05223).

Shapes: T positions, d input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from evatune.activations.batches import forward_arguments, is_encoder_decoder
from evatune.activations.gradients import first_batches
from evatune.activations.layers.linear import LINEAR
from evatune.activations.preserve import measuring_state, preserved_random_state
from evatune.adapters.preparation import Preparation, preprocessing
from evatune.errors import EvaError
from evatune.settings import IGNORED_LABEL


@torch.no_grad()
def corda(p: Preparation) -> None:
    """Store on each target the decomposition that PEFT's CorDA starts from; padding is left out.

    Each example has the same weight: its rows are divided by their largest entry before they enter the covariance, as
    in PEFT's own pass, which takes sequences only.

    Raises:
        EvaError: no batch, a target that no batch reached, a value that is not finite, or a missing package.
    """
    try:
        from peft.tuners.lora.corda import collect_eigens, crop_corda_eigens
    except ModuleNotFoundError as error:  # PEFT imports attrs here without depending on it
        raise EvaError(f"corda needs the module {error.name}, which is not installed: pip install attrs.") from None
    for name, covariance_dd in _covariances(p).items():
        module: Any = p.model.get_submodule(name)
        module.covariance_matrix = covariance_dd
        module.corda_method, module.rank = p.config.corda_config.corda_method, p.settings.rank
    config = replace(p.config, target_modules=p.pattern())
    with preprocessing():
        collect_eigens(p.model, config, False)
        crop_corda_eigens(p.model, config)
    for target in p.targets:
        for temporary in ("covariance_matrix", "corda_method", "rank"):
            vars(target.module).pop(temporary)


def _covariances(p: Preparation) -> dict[str, Tensor]:
    """Return the mean over all calls of X^T X / max(X)^2 for the rows X of each target, (d, d)."""
    sums: dict[str, Tensor] = {}
    finite: dict[str, Tensor] = {}
    counts = dict.fromkeys((target.name for target in p.targets), 0)

    def watch(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows_td = LINEAR.entering(module, args, kwargs).detach().float()
            rows_td = rows_td.reshape(-1, rows_td.shape[-1])
            if not rows_td.numel():
                return
            # Read at the end only: for every number that the host reads, it waits for the device.
            is_finite, largest = rows_td.isfinite().all(), rows_td.max().abs()
            finite[name] = finite[name] & is_finite if name in finite else is_finite
            rows_td = rows_td / torch.where(largest > 0, largest, rows_td.abs().max().clamp(min=1e-30))
            sums[name] = sums.get(name, 0) + rows_td.T @ rows_td
            counts[name] += 1

        return add

    with ExitStack() as stack:
        stack.enter_context(preserved_random_state())
        stack.enter_context(measuring_state(p.model))
        for target in p.targets:
            handle = target.module.register_forward_pre_hook(watch(target.name), with_kwargs=True)
            stack.callback(handle.remove)
        encoder_decoder = is_encoder_decoder(p.model)
        for batch in first_batches(p.given_batches(), p.settings.max_batches):
            for example in examples(batch, encoder_decoder=encoder_decoder):
                args, kwargs = forward_arguments(p.model, example, keep_labels=encoder_decoder)
                p.model(*args, **kwargs)
    if wrong := [name for name, is_finite in finite.items() if not is_finite]:
        raise EvaError(f"what enters {wrong[0]!r} is not finite; check the batches and the model.")
    if unreached := [name for name, count in counts.items() if not count]:
        raise EvaError(
            f"no row of the batches reaches {unreached[0]!r}, so corda has nothing to start it from "
            f"({len(unreached)} such targets); leave them out with exclude_modules."
        )
    return {name: total / counts[name] for name, total in sums.items()}


def examples(batch: Any, *, encoder_decoder: bool = False) -> Iterator[Any]:
    """Split a batch into examples without padding; vectors of shape (rows, features) stay whole.

    Args:
        batch: as the model takes it.
        encoder_decoder: whether labels and entries that begin with `decoder_` have padding of their own.
    """
    if not isinstance(batch, Mapping):
        batch = batch[0] if isinstance(batch, tuple | list) else batch
        yield from batch.split(1) if isinstance(batch, Tensor) and batch.ndim > 2 else [batch]
        return
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    inputs = [value for name, value in tensors.items() if name != "labels"]
    if all(value.ndim == 2 and value.is_floating_point() for value in inputs):
        yield batch
        return
    masks = {False: tensors.get("attention_mask"), True: tensors.get("decoder_attention_mask")}
    if encoder_decoder and masks[True] is None and "labels" in tensors and tensors["labels"].ndim == 2:
        masks[True] = tensors["labels"] != IGNORED_LABEL
    for i in range(len(next(iter(tensors.values())))):
        example = {name: value[i : i + 1] for name, value in tensors.items()}
        for name, value in example.items():
            mask = masks[encoder_decoder and (name == "labels" or name.startswith("decoder_"))]
            if mask is not None and mask.ndim == 2 and value.shape[:2] == (1, mask.shape[1]):
                example[name] = value[:, mask[i].bool()]
        yield example
