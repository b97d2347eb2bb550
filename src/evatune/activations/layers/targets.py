"""Which modules the settings select: found here, once, for measuring, for PEFT and for every method.

The settings have the names and the meaning that they have in PEFT's `LoraConfig`, with a few differences. Each of them
raises an error where PEFT is silent, or applies PEFT's own rule to every model:

- "all-linear" means every linear map of the model but its heads (`evatune.activations.layers.heads`): linear layers,
  `nn.MultiheadAttention`, the fused experts of a mixture and the router before them;
- a name in `target_modules` or `exclude_modules` that matches nothing is an error;
- fused experts are also matched by the names that their parts have as layers of their own: `gate_proj`, `up_proj`,
  `w1`, `w3` (together), `down_proj`, `w2`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from evatune.activations.layer_type import LayerType, TargetModule, whole_shape
from evatune.activations.layers.attention import AttentionType
from evatune.activations.layers.convolution import ConvolutionType
from evatune.activations.layers.embedding import EmbeddingType
from evatune.activations.layers.experts import ExpertsType
from evatune.activations.layers.heads import find_heads
from evatune.activations.layers.linear import LINEAR
from evatune.errors import EvaError, near_misses
from evatune.settings import Targets

ALL_LINEAR = "all-linear"
LAYER_TYPES: tuple[LayerType, ...] = (LINEAR, EmbeddingType(), ConvolutionType(), AttentionType())
"""All kinds of modules that can be measured."""

FORMER_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("w2",),),
}
"""Name of a fused parameter -> the layers that it replaced, under each set of names that they had."""


class TargetRules(Targets):
    """The settings that say which modules get an adapter, with the meaning that PEFT's `LoraConfig` gives them."""

    @property
    def all_linear(self) -> bool:
        """Whether the targets are all linear maps of the model."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def match(self, name: str) -> bool:
        """Tell whether the module of this name is a target."""
        return not self.excludes(name) and self.includes(name)

    def excludes(self, name: str) -> bool:
        """Tell whether `exclude_modules` leaves this name out."""
        excluded = self.exclude_modules
        if not excluded:
            return False
        return bool(re.fullmatch(excluded, name)) if isinstance(excluded, str) else _ends_with(name, excluded)

    def includes(self, name: str) -> bool:
        """Tell whether the other settings select this name."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        if name in self.target_modules:
            return True
        return _ends_with(name, self.target_modules) and self.in_layers(name)

    def in_layers(self, name: str) -> bool:
        """Tell whether this name belongs to one of the layers that are to be adapted."""
        wanted = self.layers_to_transform
        if wanted is None or (not isinstance(wanted, int) and not wanted):
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else (self.layers_pattern or [])
        expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for expression in expressions if (match := re.match(expression, name))), None)
        return found is not None and int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A module, or a parameter in the place of a module, that a setting may select."""

    name: str
    module: nn.Module
    parameter: str | None = None
    others: tuple[str, ...] = ()
    """Further names by which a setting may select it."""
    inside: str | None = None
    """The attention module that uses its weight and never calls it."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.others)

    def is_linear_map(self) -> bool:
        """Tell whether "all-linear" selects it."""
        if self.inside is not None or _returns_more(self.module):
            return False
        if isinstance(self.module, nn.MultiheadAttention):
            return self.module.in_proj_weight is not None
        return self.parameter is not None or LINEAR.features(self.module) is not None

    def target(self) -> TargetModule:
        if self.inside is not None:
            raise EvaError(
                f"target {self.name!r} is never called: nn.MultiheadAttention uses its weight alone, and an adapter "
                f"there has no effect; target {self.inside!r} instead, or name it in exclude_modules."
            )
        for layer in LAYER_TYPES if self.parameter is None else (ExpertsType(self.parameter),):
            try:
                features = layer.features(self.module)
            except EvaError as error:
                raise EvaError(f"target {self.name!r} is {error}") from None
            if features is not None:
                return TargetModule(
                    name=self.name,
                    module=self.module,
                    in_features=features[0],
                    out_features=features[1],
                    layer=layer,
                    parameter=self.parameter,
                )
        raise EvaError(
            f"target {self.name!r} is a {type(self.module).__name__}, which has no matrix that EVA can measure; "
            "leave it out of target_modules or name it in exclude_modules."
        )


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
        EvaError: nothing matches, or a name that matches nothing (with the nearest names), or a match that cannot be
            measured.
    """
    base = unwrap(model)
    modules = dict(_adaptable(base))
    candidates = list(_candidates(modules, further=_further_names(base)))
    allowed = [item for item in candidates if not any(map(rules.excludes, item.names))]
    if rules.all_linear:
        heads = tuple(find_heads(base))
        possible = [item for item in allowed if item.is_linear_map() and not _is_part(item.name, heads)]
        matched = [item for item in possible if rules.in_layers(item.name)]
    else:
        if isinstance(rules.target_modules, str) and rules.layers_to_transform is not None:
            raise EvaError(
                f"layers_to_transform={rules.layers_to_transform!r} goes with names or 'all-linear', not with the "
                f"regular expression {rules.target_modules!r}; put the numbers into the expression."
            )
        matched = [item for item in allowed if any(map(rules.includes, item.names))]
    parameters = _parameters(modules, rules)
    if not matched and (rules.target_modules or not parameters):
        raise EvaError(_nothing_matches(rules, candidates))
    _check_names(rules, candidates, matched)
    taken = {item.name for item in matched}
    targets = [item.target() for item in matched if item.inside not in taken]  # attention brings its output projection
    order = {id(module): number for number, module in enumerate(modules.values())}
    further = [target for target in parameters if target.name not in taken]
    return sorted([*targets, *further], key=lambda target: order[id(target.module)])


def _further_names(base: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return, by the identity of each module that stands at several places of the model, its names but the first."""
    names: dict[int, tuple[str, ...]] = {}
    for name, module in base.named_modules(remove_duplicate=False):
        names[id(module)] = (*names.get(id(module), ()), name)
    return {identity: several[1:] for identity, several in names.items() if len(several) > 1}


def _candidates(modules: Mapping[str, nn.Module], *, further: Mapping[int, tuple[str, ...]]) -> Iterator[_Candidate]:
    """Yield all modules, with the matrices of fused experts and routers in the place of their modules."""
    attention = {f"{name}.out_proj": name for name, m in modules.items() if isinstance(m, nn.MultiheadAttention)}
    routers = {router: matrix for name, m in modules.items() for router, matrix in _routers(name, m, modules)}
    for name, module in modules.items():
        fused = _fused(module)
        for parameter in fused:
            former = (old for names in FORMER_NAMES.get(parameter, ()) for old in names)
            others = (name, *(f"{name}.{old}" for old in former))
            yield _Candidate(name=f"{name}.{parameter}", module=module, parameter=parameter, others=others)
        if name in routers:
            yield _Candidate(name=f"{name}.{routers[name]}", module=module, parameter=routers[name], others=(name,))
        elif not fused:
            others = further.get(id(module), ())
            yield _Candidate(name=name, module=module, others=others, inside=attention.get(name))


def _returns_more(module: nn.Module) -> bool:
    """Tell whether a router is a linear layer that returns more than its product, which PEFT cannot wrap."""
    is_plain = type(module).forward is nn.Linear.forward
    return isinstance(module, nn.Linear) and not is_plain and "Router" in type(module).__name__


def _fused(module: nn.Module) -> list[str]:
    """Return the parameters in which a module holds the weights of all its experts.

    `is_transposed` says in which order, and marks such modules: transformers sets it, and PEFT reads it.
    """
    if not isinstance(getattr(module, "is_transposed", None), bool):
        return []
    return [name for name, value in module.named_parameters(recurse=False) if len(whole_shape(value)) == 3]


def _routers(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Yield the routers beside a module of fused experts that are not linear layers, and the name of their matrix."""
    parent = name.rpartition(".")[0]
    fused = _fused(module)
    for other, sibling in modules.items() if fused else ():
        if other.rpartition(".")[0] != parent or LINEAR.features(sibling) or _fused(sibling):
            continue
        for parameter, value in sibling.named_parameters(recurse=False):
            shape = whole_shape(value)
            if len(shape) == 2 and shape[0] == whole_shape(getattr(module, fused[0]))[0]:
                yield other, parameter


def _parameters(modules: Mapping[str, nn.Module], rules: TargetRules) -> list[TargetModule]:
    """Return the parameters that match one of `target_parameters` as targets."""
    targets, used = [], set()
    wanted = rules.target_parameters or ()
    known: dict[str, None] = {}
    for module_name, module in modules.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{parameter_name}"
            if len(whole_shape(parameter)) == 3:
                known[".".join(name.rsplit(".", 2)[-2:])] = None
            endings = {ending for ending in wanted if name == ending or name.endswith(f".{ending}")}
            if not endings or rules.excludes(name) or rules.excludes(module_name):
                continue
            used |= endings
            if len(whole_shape(parameter)) not in (2, 3) or LINEAR.features(module):
                raise EvaError(
                    f"parameter {name!r} of shape {whole_shape(parameter)} does not hold the weights of several "
                    "experts; name its module in target_modules instead of target_parameters."
                )
            targets.append(_Candidate(name=name, module=module, parameter=parameter_name).target())
    missing = [ending for ending in wanted if ending not in used]
    if missing:
        raise EvaError(
            f"no parameter of the model matches target_parameters={missing[0]!r}{near_misses(missing[0], known)}; "
            f"its fused experts are {', '.join(list(known)[:12]) or 'none'}."
        )
    return targets


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


def _check_names(rules: TargetRules, candidates: Sequence[_Candidate], matched: Sequence[_Candidate]) -> None:
    """Check that every name and number in the settings matches something.

    Raises:
        EvaError: one does not.
    """
    names = [name for item in candidates for name in item.names]
    leaves = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    settings = {"target_modules": rules.target_modules, "exclude_modules": rules.exclude_modules}
    for setting, value in settings.items():
        if isinstance(value, str):
            if setting == "exclude_modules" and value and not any(re.fullmatch(value, name) for name in names):
                raise EvaError(f"{setting}={value!r} matches no module of the model; correct it or leave it out.")
            continue
        for wanted in value or ():
            if not any(_ends_with(name, [wanted]) for name in names):
                hint = near_misses(wanted.rsplit(".", 1)[-1], leaves)
                raise EvaError(
                    f"{wanted!r} in {setting} matches no module of the model{hint}; correct it or leave it out."
                )
    if rules.exclude_modules and not isinstance(rules.exclude_modules, str):
        for wanted in rules.exclude_modules:
            inside = [item for item in matched if not _ends_with(item.name, [wanted]) and _has_part(item.name, wanted)]
            if inside:
                raise EvaError(
                    f"{wanted!r} in exclude_modules names a part of the model and not a target, so it does not exclude "
                    f"the targets inside it, such as {inside[0].name!r}; write the regular expression "
                    f"'(.*\\.)?{re.escape(wanted)}\\..*' instead."
                )
    numbers = rules.layers_to_transform
    for number in [numbers] if isinstance(numbers, int) else numbers or ():
        one = TargetRules(layers_to_transform=number, layers_pattern=rules.layers_pattern)
        if not any(one.in_layers(item.name) for item in matched):
            raise EvaError(f"layers_to_transform={numbers!r}: no target is in a layer with the number {number}.")
    if not isinstance(rules.target_modules, str):
        _check_former_names(rules, matched)


def _check_former_names(rules: TargetRules, matched: Sequence[_Candidate]) -> None:
    """Check that the settings name all former parts of a layer that is one parameter now."""
    for item in matched:
        if item.parameter is None or _named(rules, (item.name, item.name.removesuffix(f".{item.parameter}"))):
            continue
        for parts in FORMER_NAMES.get(item.parameter, ()):
            stem = item.name.removesuffix(item.parameter)
            given = [part for part in parts if _named(rules, (f"{stem}{part}",))]
            if given and len(given) < len(parts):
                missing = next(part for part in parts if part not in given)
                raise EvaError(
                    f"target_modules names {given[0]!r} without {missing!r}, but {item.name!r} holds both in one "
                    f"parameter; name both, or exclude {stem.rstrip('.')!r}."
                )


def _named(rules: TargetRules, names: Iterable[str]) -> bool:
    return any(_ends_with(name, rules.target_modules) for name in names)


def _is_part(name: str, of: Iterable[str]) -> bool:
    return any(name == whole or name.startswith(f"{whole}.") for whole in of)


def _has_part(name: str, part: str) -> bool:
    return f".{part}." in f".{name}"


def _ends_with(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _nothing_matches(rules: TargetRules, candidates: Sequence[_Candidate]) -> str:
    wanted = [rules.target_modules] if isinstance(rules.target_modules, str) else list(rules.target_modules)
    linear = [item.name for item in candidates if item.is_linear_map()]
    leaves = dict.fromkeys(name.rsplit(".", 1)[-1] for name in linear)
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
