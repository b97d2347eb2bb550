"""Which modules are targets, by the rules of PEFT's `LoraConfig`, on bare and on already wrapped models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from evatune.activations.layer_type import LINEAR, EmbeddingType, LayerType
from evatune.activations.layers.attention import AttentionType
from evatune.activations.layers.convolution import ConvolutionType
from evatune.activations.layers.experts import ExpertsType
from evatune.errors import EvaError, near_misses
from evatune.settings import Targets

ALL_LINEAR = "all-linear"
CLASSIFIER_NAMES = ("score", "classifier")
LAYER_TYPES: tuple[LayerType, ...] = (LINEAR, EmbeddingType(), ConvolutionType(), AttentionType())
"""All kinds of modules that can be measured."""


class TargetRules(Targets):
    """The settings that say which modules get an adapter, with the meaning that PEFT's `LoraConfig` gives them."""

    def match(self, name: str) -> bool:
        """Tell whether the module of this name is a target."""
        excluded = self.exclude_modules
        if excluded and (re.fullmatch(excluded, name) if isinstance(excluded, str) else _ends_with(name, excluded)):
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        if name in self.target_modules:
            return True
        return _ends_with(name, self.target_modules) and self._match_layer(name)

    def _match_layer(self, name: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or (not isinstance(wanted, int) and not wanted):
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else (self.layers_pattern or [])
        expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for expression in expressions if (match := re.match(expression, name))), None)
        return found is not None and int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)


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
    layer: LayerType = LINEAR
    """How its input becomes rows."""


def unwrap(model: Any) -> nn.Module:
    """Return the base model inside `torch.compile`, data-parallel and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def find_targets(model: nn.Module, rules: TargetRules) -> list[TargetModule]:
    """Return the targets of a model in its own order.

    Args:
        model: a model, bare or wrapped by PEFT, `torch.compile` or data parallelism.
        rules: which modules are targets.

    Returns:
        At least one target.

    Raises:
        EvaError: nothing matches (with the nearest names), or something matches that cannot be measured.
    """
    base = unwrap(model)
    candidates = dict(_adaptable(base))
    order = {id(module): number for number, module in enumerate(candidates.values())}
    uncalled = {
        f"{name}.out_proj": name for name, module in candidates.items() if isinstance(module, nn.MultiheadAttention)
    }
    linear = [name for name, module in candidates.items() if LINEAR.features(module) and name not in uncalled]
    if isinstance(rules.target_modules, str) and rules.target_modules.lower() == ALL_LINEAR:
        heads = _head_names(base)
        names = [name for name in linear if name not in heads]
        rules = replace(rules, target_modules=tuple(names), layers_to_transform=None, layers_pattern=None)
    matched = {name: module for name, module in candidates.items() if rules.match(name)}
    parameters = _parameters(candidates, rules.target_parameters or ())
    if not matched and (rules.target_modules or not parameters):
        raise EvaError(_nothing_matches(rules, linear))
    targets = [
        _target(name, module, inside=uncalled.get(name))
        for name, module in matched.items()
        if uncalled.get(name) not in matched  # the attention module brings its output projection with it
    ]
    return sorted([*targets, *parameters], key=lambda target: order[id(target.module)])


def _parameters(candidates: Mapping[str, nn.Module], wanted: Sequence[str]) -> list[TargetModule]:
    """Return the parameters that match one of the wanted names or name endings as targets."""
    targets, used = [], set()
    known: dict[str, None] = {}
    for module_name, module in candidates.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{parameter_name}"
            if parameter.ndim == 3:
                known[".".join(name.rsplit(".", 2)[-2:])] = None
            endings = {ending for ending in wanted if name == ending or name.endswith(f".{ending}")}
            if not endings:
                continue
            layer = ExpertsType(parameter_name)
            features = layer.features(module)
            if features is None:
                raise EvaError(
                    f"parameter {name!r} of shape {tuple(parameter.shape)} does not hold the weights of several "
                    "experts; name its module in target_modules instead of target_parameters."
                )
            used |= endings
            targets.append(
                TargetModule(name=name, module=module, in_features=features[0], out_features=features[1], layer=layer)
            )
    missing = [ending for ending in wanted if ending not in used]
    if missing:
        raise EvaError(
            f"no parameter of the model matches target_parameters={missing[0]!r}{near_misses(missing[0], known)}; "
            f"its fused experts are {', '.join(list(known)[:12]) or 'none'}."
        )
    return targets


def _target(name: str, module: nn.Module, *, inside: str | None) -> TargetModule:
    """Return a matched module as a target; `inside` names the attention module that it is a part of."""
    if inside is not None:
        raise EvaError(
            f"target {name!r} is never called: nn.MultiheadAttention uses its weight alone, and an adapter there has "
            f"no effect; target {inside!r} instead, or name it in exclude_modules."
        )
    for layer in LAYER_TYPES:
        try:
            features = layer.features(module)
        except EvaError as error:
            raise EvaError(f"target {name!r} is {error}") from None
        if features is not None:
            return TargetModule(
                name=name, module=module, in_features=features[0], out_features=features[1], layer=layer
            )
    raise EvaError(
        f"target {name!r} is a {type(module).__name__}, which has no matrix that EVA can measure; "
        "leave it out of target_modules or name it in exclude_modules."
    )


def _adaptable(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module that could be a target, with what PEFT put into and around it left out."""
    hidden: tuple[str, ...] = ()
    for path, module in base.named_modules():
        name = path.replace("._orig_mod", "")  # of parts that were compiled one by one
        if name.startswith(hidden) and hidden:
            continue
        if hasattr(module, "_orig_mod"):
            continue  # the module inside comes next, under the same name
        if hasattr(module, "base_layer"):
            hidden += (name + ".",)
            while hasattr(module, "base_layer"):
                module = module.base_layer
        elif hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
            hidden += (name + ".",)
            continue
        if name:
            yield name, module


def _head_names(base: nn.Module) -> set[str]:
    """Return the names of the output head, which "all-linear" leaves out: it is new, or as wide as the vocabulary."""
    get_output = getattr(base, "get_output_embeddings", None)
    head = get_output() if get_output else None
    heads = [head] if head is not None else [getattr(base, name, None) for name in CLASSIFIER_NAMES][:2]
    roots = {id(head) for head in heads if head is not None}
    names = [name for name, module in base.named_modules() if id(module) in roots]
    return {
        name for name, _ in base.named_modules() if any(name == root or name.startswith(root + ".") for root in names)
    }


def _ends_with(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _nothing_matches(rules: TargetRules, names: Sequence[str]) -> str:
    wanted = [rules.target_modules] if isinstance(rules.target_modules, str) else list(rules.target_modules)
    leaves = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    hints = "".join(near_misses(name.rsplit(".", 1)[-1], leaves) for name in wanted[:1])
    shown = ", ".join(wanted[:3]) + (", …" if len(wanted) > 3 else "")
    limits = [
        f"{name}={value!r}" for name in ("exclude_modules", "layers_to_transform") if (value := rules.to_json()[name])
    ]
    limit = f" with {', '.join(limits)}" if limits else ""
    return (
        f"no module of the model matches target_modules={shown!r}{limit}{hints}; "
        f"its linear layers are {', '.join(list(leaves)[:12]) or 'none'}."
    )
