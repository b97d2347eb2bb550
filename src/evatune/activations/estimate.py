"""What memory a measurement will take at most, from the model's configuration alone.

The model is made without weights, and one batch without values goes through it (`evatune.activations.from_disk.trace`).

Shapes: n rows of a batch, d features, k components, l sketch columns.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from evatune.activations.from_disk.empty import empty_model, model_folder, read_config
from evatune.activations.from_disk.measure import find_blocks
from evatune.activations.from_disk.trace import Trace, follow
from evatune.activations.layers.targets import TargetModule, TargetRules, find_targets, unwrap
from evatune.activations.measure import pca_maker, with_ranks_of
from evatune.errors import EvaError
from evatune.pca import AnyPCA
from evatune.settings import Measuring, takes
from evatune.tables import byte_size, text_table


@dataclass(frozen=True, kw_only=True)
class InputKind:
    """All inputs whose names differ only in the number of their block."""

    name: str
    """Name of the first target, with `*` for the numbers."""
    count: int
    """How many such inputs the model has."""
    n_targets: int
    """How many targets share each of them."""
    in_features: int
    """Width, d."""
    backend: str
    """Backend of the streaming PCA."""
    width: int | None
    """Columns with which the sketch begins, l, where there is one."""
    n_rows: int
    """Rows of a full batch, n."""
    state_bytes: int
    """Upper bound of the bytes of the state of one of them: the tensors of its `state_dict`."""
    initial_bytes: int
    """Bytes of that state at the beginning; a sketch gets wider if it misses too much."""
    cached_bytes: int
    """Upper bound of the bytes that are kept beside each state from one check to the next."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What memory a measurement will take at most."""

    model: str
    """Class of the model."""
    batch_size: int
    """Samples in a batch."""
    length: int | None
    """Positions of a sample, where the model takes tokens."""
    max_batches: int
    """Batches, if no rule ends the measurement earlier."""
    kinds: list[InputKind] = field(default_factory=list)
    """The inputs."""
    traced: bool = True
    """Whether a batch could be followed through the empty model. If not, the estimate assumes that no input is
    shared and that every row of a batch enters each of them."""
    weights_bytes: int = 0
    """Bytes of all parameters in the dtype of the model."""
    block_bytes: int | None = None
    """Bytes of the parameters of the largest block, if `measure_from_disk` can be used."""
    hidden_bytes: int | None = None
    """Bytes of the hidden states of all batches, which wait between blocks in `measure_from_disk`."""

    @property
    def n_inputs(self) -> int:
        """How many inputs are measured."""
        return sum(kind.count for kind in self.kinds)

    @property
    def state_bytes(self) -> int:
        """Upper bound of the bytes of all states together."""
        return sum(kind.count * kind.state_bytes for kind in self.kinds)

    @property
    def initial_bytes(self) -> int:
        """Bytes of all states together at the beginning."""
        return sum(kind.count * kind.initial_bytes for kind in self.kinds)

    @property
    def cached_bytes(self) -> int:
        """Upper bound of the bytes that are kept beside the states."""
        return sum(kind.count * kind.cached_bytes for kind in self.kinds)

    def table(self) -> str:
        """Return the inputs as a table, and below it the sums and how to read them."""
        rows = [
            [
                kind.name + (f" (+{kind.n_targets - 1})" if kind.n_targets > 1 else ""),
                kind.count,
                kind.in_features,
                kind.backend,
                kind.width,
                f"{kind.n_rows:,}",
                byte_size(kind.state_bytes),
                byte_size(kind.count * kind.state_bytes),
            ]
            for kind in self.kinds
        ]
        titles = ["input (+ shared by)", "inputs", "width", "backend", "sketch", "rows a batch", "state", "all"]
        lines = [
            text_table(titles, rows),
            "",
            f"states    {self._states()}, and {byte_size(self.cached_bytes)} kept from check to check",
            f"weights   {byte_size(self.weights_bytes)}",
        ]
        if self.block_bytes is not None and self.hidden_bytes is not None:
            block, hidden = byte_size(self.block_bytes), byte_size(self.hidden_bytes)
            lines.append(f"from disk largest block {block}, waiting hidden states {hidden}")
        if not self.traced:
            lines.append(
                "this model cannot run without its weights, so a shared input is counted once for each of its targets"
            )
        return "\n".join(lines)

    def _states(self) -> str:
        if self.initial_bytes == self.state_bytes:
            return f"{byte_size(self.state_bytes)} at most"
        return f"{byte_size(self.initial_bytes)} at first, {byte_size(self.state_bytes)} at most"

    def to_json(self) -> dict[str, Any]:
        """Return everything, for programs."""
        names = ("n_inputs", "state_bytes", "initial_bytes", "cached_bytes")
        return asdict(self) | {name: getattr(self, name) for name in names}


@takes(Measuring)
def estimate(
    model: Any,
    *,
    batch_size: int = 4,
    length: int = 256,
    weights_dtype: torch.dtype | None = None,
    head: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    settings: Measuring | None = None,
    **options: Any,
) -> Estimate:
    """Tell what memory `measure` or `measure_from_disk` will take at most, without weights and without data.

    Args:
        model: a transformers configuration, a model (only its class and configuration are used), or the folder or hub
            id of one (only its configuration is read).
        batch_size: samples in a batch.
        length: tokens of a sample; models of images take the size in their configuration.
        weights_dtype: dtype of the weights; by default that of the configuration.
        head: which class of model, as for `evatune.models.load_model`.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that comes with a hub model.
        settings: all options of `measure` in one object; the options below change it.
        options: see the list below.

    Returns:
        The estimate. Its bounds assume sums in float32, as they are for models in float32 or half precision.

    Raises:
        EvaError: a setting is out of range, nothing matches, or there is no such configuration.
    """
    settings = Measuring.of(options, settings=settings, call="evatune.estimate")
    max_batches = settings.max_batches
    for name, value in (("batch_size", batch_size), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise EvaError(f"{name} must be a whole number of at least 1, got {value!r}.")
    config = _config(model, head=head, revision=revision, trust_remote_code=trust_remote_code)
    if isinstance(model, nn.Module):
        weights_dtype = weights_dtype or next(unwrap(model).parameters()).dtype
    build = partial(empty_model, config, head=head, trust_remote_code=trust_remote_code)
    rules = settings.part(TargetRules)
    empty: Any = build(dtype=weights_dtype)
    targets = find_targets(empty, rules)
    with_ranks_of(settings, [target.name for target in targets])  # names must fit here as well as in `measure`
    trace = follow(build, rules, weights_dtype, batch_size=batch_size, length=length)
    traced = trace is not None
    trace = trace or Trace()
    length_or_none = None if _takes_images(empty) else length
    default_rows = batch_size * (length_or_none or 1)
    block_bytes, hidden_bytes = _blocks(empty, targets, trace, max_batches)
    tied = getattr(empty, "all_tied_weights_keys", None) or {}
    return Estimate(
        model=type(empty).__name__,
        batch_size=batch_size,
        length=length_or_none,
        max_batches=max_batches,
        kinds=[
            _kind(
                name,
                members,
                n_targets=sharing,
                n_rows=max(trace.n_rows.get(target.name, default_rows if not traced else 0) for target in members),
                pca=members[0].layer.new_pca(members[0].module, settings.n_kept, pca_maker(settings)),
            )
            for (name, _, sharing), members in _alike(targets, trace).items()
        ],
        traced=traced,
        weights_bytes=sum(parameter.nbytes for name, parameter in empty.named_parameters() if name not in tied),
        block_bytes=block_bytes,
        hidden_bytes=hidden_bytes,
    )


def _alike(targets: Sequence[TargetModule], trace: Trace) -> dict[tuple[str, int, int], list[TargetModule]]:
    """Return the first target of each input, by the input's name without numbers, its width and how many share it."""
    alike: dict[tuple[str, int, int], list[TargetModule]] = {}
    for target in targets:
        first = trace.first_of.get(target.name, target.name)
        if first == target.name:
            sharing = sum(owner == first for owner in trace.first_of.values()) or 1
            name = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", target.name)
            alike.setdefault((name, target.in_features, sharing), []).append(target)
    return alike


def _config(model: Any, *, head: str | None, revision: str | None, trust_remote_code: bool) -> Any:
    """Return the configuration of whatever names a model."""
    if isinstance(model, str | os.PathLike):
        folder = model_folder(model, revision=revision, weights=False)
        return read_config(folder, trust_remote_code=trust_remote_code)
    if not isinstance(model, nn.Module):
        return model
    base: Any = unwrap(model)
    if not hasattr(base, "config"):
        raise EvaError(f"{type(base).__name__} has no configuration to make an empty model of.")
    config = copy.deepcopy(base.config)
    if head is None:
        config.architectures = [type(base).__name__]
    return config


def _takes_images(model: Any) -> bool:
    return getattr(model, "main_input_name", "input_ids") == "pixel_values"


def _blocks(
    model: nn.Module, targets: Sequence[TargetModule], trace: Trace, max_batches: int
) -> tuple[int | None, int | None]:
    """Return the bytes of the largest block and of all waiting hidden states, where there is one list of blocks."""
    try:
        blocks = find_blocks(model, targets)
    except EvaError:
        return None, None
    largest = max(sum(parameter.nbytes for parameter in block.parameters()) for block in blocks.values())
    hidden = max((trace.n_hidden.get(name, 0) for name in blocks), default=0)
    return largest, hidden * next(model.parameters()).itemsize * max_batches or None


def _kind(name: str, members: Sequence[TargetModule], *, n_targets: int, n_rows: int, pca: AnyPCA) -> InputKind:
    cost = pca.cost(n_features=members[0].in_features)
    return InputKind(
        name=name,
        count=len(members),
        n_targets=n_targets,
        in_features=members[0].in_features,
        n_rows=n_rows,
        backend=cost.backend,
        width=cost.width,
        state_bytes=cost.state_bytes,
        initial_bytes=cost.initial_bytes,
        cached_bytes=cost.cached_bytes,
    )
