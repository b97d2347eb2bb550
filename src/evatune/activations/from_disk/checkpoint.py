"""Weights that stay on disk: a model without weights, and the safetensors from which parts of it are filled.

Tensors are read one at a time, each file being opened and closed around it: a mapped file counts as resident memory up
to its whole size for as long as it stays open.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from evatune.errors import EvaError

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint:
    """The tensors of a folder of safetensors, sharded or not.

    Args:
        folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`.

    Raises:
        EvaError: there are no safetensors, or the index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        index, single = folder / _INDEX, folder / _SINGLE
        if index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (json.JSONDecodeError, KeyError) as error:
                raise EvaError(f"{index} is damaged ({error!r}); copy the model again.") from None
            self.files = {key: folder / name for key, name in names.items()}
        elif single.is_file():
            with _explained(single), safe_open(single, framework="pt") as file:
                self.files = dict.fromkeys(file.keys(), single)
        else:
            raise EvaError(
                f"the folder {folder} has no safetensors, and only these can be read in parts; load the model once and "
                "write it with save_pretrained."
            )

    def read(self, key: str) -> Tensor:
        """Return one tensor in memory of its own."""
        path = self.files[key]
        with _explained(path), safe_open(path, framework="pt") as file:
            return file.get_tensor(key).clone()

    def dtype(self) -> torch.dtype:
        """Return the dtype of most tensors, by number of tensors."""
        counts: Counter[torch.dtype] = Counter()
        for path in set(self.files.values()):
            with _explained(path), safe_open(path, framework="pt") as file:
                counts.update(_DTYPES.get(file.get_slice(key).get_dtype(), torch.float32) for key in file.keys())  # noqa: SIM118
        return counts.most_common(1)[0][0]


class StoredWeights:
    """Fills parts of a model on the meta device from a checkpoint, and empties them again.

    Names and layouts in a file may differ from those in the model: a prefix is added or missing, layer norms have their
    old names, projections are fused now. With transformers 5 its own conversion rules for each model are used; with
    older versions only the prefix and the names of layer norms are handled.

    Args:
        model: a transformers model whose parameters are on the meta device.
        checkpoint: the weights.
        device: where filled parameters live.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, *, device: torch.device) -> None:
        self.model: Any = model
        self.checkpoint = checkpoint
        self.device = device
        self._empty: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
        self._filled: set[str] = set()
        self._rules = _conversion_rules(model)
        self._keys_of: dict[str, set[str]] = {}
        state = model.state_dict()
        for key in checkpoint.files:
            for name in self._rules.names_of(key, state) if self._rules else _plain_names_of(key, model, state):
                self._keys_of.setdefault(name, set()).add(key)
        # Of several tied weights, a file holds only one.
        pairs = dict(getattr(model, "all_tied_weights_keys", None) or {})
        pairs |= {source: name for name, source in pairs.items()}
        self._twin_of = {
            name: twin for name, twin in pairs.items() if name not in self._keys_of and twin in self._keys_of
        }

    def __contains__(self, name: str) -> bool:
        return name in self._keys_of or name in self._twin_of

    @contextmanager
    def filled(self, prefix: str) -> Iterator[None]:
        """Fill a module and all below it for as long as the `with` block lasts.

        Args:
            prefix: name of the module.
        """
        try:
            self.fill(name for name in self.model.state_dict() if name.startswith(prefix + "."))
            yield
        finally:
            self.empty()

    def fill(self, names: Iterable[str]) -> None:
        """Read parameters and persistent buffers by name.

        Raises:
            EvaError: the checkpoint does not hold one of the parameters, or holds it in another shape.
        """
        wanted = [name for name in names if name not in self._filled]
        tied = {name: self._twin_of[name] for name in wanted if name in self._twin_of}
        wanted = [*(name for name in wanted if name not in tied), *tied.values()]
        missing = [name for name in wanted if name in self._empty and name not in self._keys_of]
        if missing:
            raise EvaError(
                f"the checkpoint {self.checkpoint.folder} has no weights for {missing[0]!r}"
                + (f" and {len(missing) - 1} others" if len(missing) > 1 else "")
                + "; load the model whole and write it with save_pretrained, or use `measure`."
            )
        self._filled.update(wanted, tied)
        keys = sorted(set().union(*(self._keys_of.get(name, set()) for name in wanted)))
        if not keys:
            return
        stored = {key: _Stored(self.checkpoint, key) for key in keys}
        if self._rules:
            self._rules.fill(self.model, stored, self.device)
        else:
            for name in wanted:
                for key in self._keys_of.get(name, ()):
                    value, present = stored[key][...], _get(self.model, name)
                    if value.shape == present.shape:
                        _set(self.model, name, value.to(self.device, present.dtype))
        for name, twin in tied.items():
            _set(self.model, name, _get(self.model, twin))
        for name in wanted:
            if name in self._empty and _get(self.model, name).is_meta:
                raise EvaError(
                    f"{name!r} of the checkpoint {self.checkpoint.folder} does not fit the model, which expects "
                    f"{tuple(self._empty[name].shape)}; is config.json that of another model?"
                )

    def empty(self) -> None:
        """Put everything that was filled back on the meta device."""
        for name, parameter in self._empty.items():
            if not _get(self.model, name).is_meta:
                _set(self.model, name, parameter)
        self._filled.clear()


class _Stored:
    """A tensor that is read only when it is sliced; transformers slices it when it needs the values."""

    def __init__(self, checkpoint: Checkpoint, key: str) -> None:
        self.checkpoint, self.key = checkpoint, key

    def __getitem__(self, _: Any) -> Tensor:
        return self.checkpoint.read(self.key)


class _ConversionRules:
    """The rules of transformers 5 that lead from the names in files to the names in a model."""

    def __init__(self, model: Any) -> None:
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._loading = loading
        self._prefix = model.base_model_prefix
        self._mapping: Any = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in self._mapping if isinstance(rule, loading.WeightRenaming)]
        self._converters = [rule for rule in self._mapping if isinstance(rule, loading.WeightConverter)]

    def names_of(self, key: str, state: dict[str, Tensor]) -> list[str]:
        """Return the parameters that are made from a tensor of the file."""
        rename = self._loading.rename_source_key
        name, pattern = rename(key, self._renamings, self._converters, self._prefix, state)
        if name not in state and key in state:
            name, pattern = rename(key, [], [], self._prefix, state)
        if pattern is None:
            return [name]
        converter = next(rule for rule in self._converters if pattern in rule.source_patterns)
        first, *others = converter.target_patterns
        return [name, *(name.replace(first, other) for other in others)]

    def fill(self, model: Any, stored: dict[str, _Stored], device: torch.device) -> None:
        """Read tensors, convert them and put them into the model in the dtype that it has."""
        from transformers.modeling_utils import LoadStateDictConfig

        from evatune.models.calls import no_progress_bars

        config = LoadStateDictConfig(weight_mapping=self._mapping, device_map={"": device})
        with no_progress_bars():
            self._loading.convert_and_load_state_dict_in_model(model, stored, config)


def _conversion_rules(model: nn.Module) -> _ConversionRules | None:
    try:
        return _ConversionRules(model)
    except ImportError:  # transformers 4
        return None


def _plain_names_of(key: str, model: Any, state: dict[str, Tensor]) -> list[str]:
    """Return the parameter of a tensor of the file, by prefix and the old names of layer norms alone."""
    prefix = f"{model.base_model_prefix}."
    key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return [name for name in (key, prefix + key, key.removeprefix(prefix)) if name in state][:1]


def _get(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), leaf)
    return tensor


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    is_new = leaf in module._parameters and not isinstance(value, nn.Parameter)
    setattr(module, leaf, nn.Parameter(value, requires_grad=False) if is_new else value)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise EvaError(f"{path} cannot be read ({error}); it is damaged or cut short: copy the model again.") from None
