"""Turn whatever a loader yields into the arguments of a forward pass, and read which of its positions count."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evatune.activations.positions import DECODER, INPUTS, LABELS, BatchPositions, Given, entries_of, read_positions
from evatune.activations.variants import with_entries
from evatune.errors import EvaError, near_misses
from evatune.pca.moving import moved


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model: that of its first parameter with values."""
    return next(_devices_of_parameters(model), torch.device("cpu"))


def devices_of(model: nn.Module) -> list[torch.device]:
    """Return the devices on which a model has parameters with values, in their order; the CPU if it has none."""
    return list(dict.fromkeys(_devices_of_parameters(model))) or [torch.device("cpu")]


def _devices_of_parameters(model: nn.Module) -> Iterator[torch.device]:
    return (parameter.device for parameter in model.parameters() if parameter.device.type != "meta")


def forward_arguments(model: nn.Module, batch: Any, *, keep_labels: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments with which a batch enters a model.

    Args:
        model: the base model.
        batch: a mapping (strings, and entries that the model's `forward` does not take, are left out), a tuple or list
            whose first element is a mapping or a tensor of inputs (the rest are labels), or a tensor.
        keep_labels: pass `labels` on; encoder-decoder models make their decoder's input from them. Otherwise they are
            left out, so that no loss is computed.

    Raises:
        EvaError: the batch is none of these, or shares no entry with `forward`.
    """
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    device = device_of(model)
    if isinstance(batch, Tensor):
        return (moved(batch, device),), {}
    if not isinstance(batch, Mapping):
        raise EvaError(
            f"a batch must be a mapping, a tensor or a tuple that starts with one, got {type(batch).__name__}; "
            "pass forward=lambda model, batch: … for anything else."
        )
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments = {}
    for name, value in batch.items():
        is_text = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str))
        if is_text or not (takes_any or name in parameters) or (name == "labels" and not keep_labels):
            continue
        arguments[name] = moved(value, device) if isinstance(value, Tensor) else value
    if not arguments:
        raise EvaError(
            f"the batch has {', '.join(map(repr, batch)) or 'no entries'}, but the model's forward takes "
            f"{', '.join(list(parameters)[:6])}, …; rename the entries or pass forward=."
        )
    if "use_cache" in parameters:
        arguments.setdefault("use_cache", False)
    return (), arguments


def with_decoder_inputs(model: Any, batch: Any) -> Any:
    """Return the batch with the inputs that an encoder-decoder model makes from labels, so that it computes no loss."""
    entries = entries_of(batch)
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if make is None or not isinstance(entries.get(LABELS), Tensor) or any(DECODER + name in entries for name in INPUTS):
        return batch
    return with_entries(batch, {DECODER + "input_ids": make(labels=entries[LABELS])})


def is_encoder_decoder(model: Any) -> bool:
    """Return whether a model's configuration says that it has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def reader_of(
    model: Any, *, use_label_mask: bool = False, row_mask: Callable[[Any], Given] | None = None
) -> Callable[[Any], BatchPositions]:
    """Return a function that reads which positions of a batch count, see `read_positions`.

    Args:
        model: the base model.
        use_label_mask: count only positions that enter the loss.
        row_mask: if given, it alone says which positions count.
    """
    if row_mask is not None:
        names = {name for name, _ in itertools.chain(model.named_modules(), model.named_parameters())}
        return lambda batch: BatchPositions(given=_checked(row_mask(batch), names))
    return partial(
        read_positions,
        encoder_decoder=is_encoder_decoder(model),
        use_label_mask=use_label_mask,
        loss_type=getattr(model, "loss_type", None),
    )


def _checked(given: Any, names: Collection[str]) -> Given:
    """Return the masks that a caller has given, on the CPU.

    Raises:
        EvaError: one is no tensor, or names no module.
    """
    masks: Mapping[str, Any] = given if isinstance(given, Mapping) else {"": given}
    for name, mask in masks.items():
        if name not in names:
            raise EvaError(f"row_mask names {name!r}, which is no module{near_misses(str(name), names)}.")
        if not isinstance(mask, Tensor | None):
            raise EvaError(f"row_mask must give tensors, or None for all rows, and gives a {type(mask).__name__}.")
    return {name: None if mask is None else mask.cpu() for name, mask in masks.items()}


def takes_entry(model: nn.Module, name: str) -> bool:
    """Tell whether the `forward` of a model has a parameter of this name."""
    return name in inspect.signature(model.forward).parameters


def reserved_tokens(model: Any) -> frozenset[int]:
    """Return the token numbers that the configuration of a model names, such as those that stand for pictures."""
    config: Any = getattr(model, "config", None)
    return frozenset(_token_numbers(config.to_dict())) if hasattr(config, "to_dict") else frozenset()


def _token_numbers(settings: Mapping[str, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _token_numbers(value)
        elif "token" in str(name) and isinstance(value, int):
            yield value
