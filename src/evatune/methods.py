"""Every method by its name: what it is, what it needs, what it goes with. Imports neither torch nor peft.

A name is a start (`eva`, `pissa`, ...) and any options behind a plus: `eva+dora`, `pissa+rslora`, `eva+lora+`. An
option alone, `dora`, is that option on plain LoRA. `evatune.prepare` makes a model of a name.

A row says everything that is particular to a method, so no other code asks for a method's name. What a row cannot say
in a value it points to, by its home: "package.module:function". A new method is one row here and what it points to.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evatune.errors import EvaError, near_misses


@dataclass(frozen=True, kw_only=True)
class Option:
    """What can be added to a start with a plus, and stand alone as `lora` with it."""

    idea: str
    """The idea, as the end of a sentence that begins with the option's name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of PEFT's `LoraConfig`."""
    in_four_bits: bool = False
    """Whether the frozen weights of the targets are held in 4 bits."""
    optimizer: str = ""
    """Home of the function that makes the optimizer of a model from the recipe's section `train`; by default the
    trainer's own."""


OPTIONS = {
    "rslora": Option(
        idea="scales the adapter by alpha / sqrt(rank) instead of alpha / rank", settings={"use_rslora": True}
    ),
    "dora": Option(idea="trains magnitude and direction of each weight apart", settings={"use_dora": True}),
    "lora+": Option(
        idea="gives B a higher learning rate than A", optimizer="evatune.adapters.loraplus:optimizer_as_set"
    ),
    "qlora": Option(idea="holds the frozen weights in 4 bits", in_four_bits=True),
}
"""All options by name."""

_FIXED_SCALE = "has a scale and parameters of its own, not LoRA's A and B"
_NO_ADAPTER = "has no adapter: all weights are trained"
_NEEDS_FLOAT = "computes a new base weight, which 4 bits cannot hold exactly"
_NEEDS_GRADIENT = "needs the gradient of the weights, which 4-bit weights do not have"
_CHANGES_BASE = {"qlora": _NEEDS_FLOAT}
_MATRICES = ("Linear", "Conv1D")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to start fine-tuning."""

    name: str
    """Name in recipes, on the command line and for `evatune.prepare`."""
    idea: str
    """The idea in one sentence."""
    needs_batches: bool = False
    """Whether it looks at data before training."""
    needs_spectra: bool = False
    """Whether what it looks at are activations, so that spectra measured before will do instead of batches."""
    needs_all_components: bool = False
    """Whether it needs all components of these spectra, which are too many to keep with a run."""
    needs_gradients: bool = False
    """Whether it computes the loss of batches and its gradient, for which spectra do not do."""
    changes_base: bool = False
    """Whether it takes the adapter's start out of the base weights; evatune saves such adapters converted."""
    layers: tuple[str, ...] = ()
    """The classes of layers that it adapts, where it does not adapt all."""
    vectors: int = 0
    """How many singular vectors of the weight or its gradient one rank takes."""
    config: str = "evatune.adapters.configs:lora"
    """Home of the function that makes the PEFT configuration; none for full fine-tuning."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of that configuration."""
    start: str = ""
    """Home of the function that computes the start, where PEFT alone does not."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of that function."""
    measuring: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of its own for options of `measure`."""
    callbacks: tuple[str, ...] = ()
    """Homes of what training has to do besides, each a function that takes the checkpoint that training resumes from,
    or None, and returns a callback of transformers' `Trainer`."""
    reads_gradients: bool = False
    """Whether one of these callbacks reads the gradients of the adapter."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Options that make no sense with it, and why."""

    @property
    def has_adapter(self) -> bool:
        """Whether it trains an adapter and not the model itself."""
        return bool(self.config)

    @property
    def takes_plan(self) -> bool:
        """Whether a plan that was made before can decide its ranks."""
        return self.needs_spectra and not self.needs_gradients and not self.needs_all_components

    @property
    def is_lora(self) -> bool:
        """Whether its adapter is LoRA: factors A and B with one scale."""
        return self.config == Method.config


def at_home(home: str) -> Any:
    """Return what a row points to: "package.module:name"."""
    module, _, name = home.partition(":")
    return getattr(importlib.import_module(module), name)


def _eva(name: str, idea: str, **options: Any) -> Method:
    row = {key: options.pop(key) for key in Method.__dataclass_fields__ if key in options}
    return Method(
        name=name,
        idea=idea,
        needs_batches=True,
        needs_spectra=True,
        options=options,
        **{"start": "evatune.adapters.starts:eva"} | row,
    )


def _alone(reason: str) -> dict[str, str]:
    return dict.fromkeys(OPTIONS, reason)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="full",
            idea="All weights of the model are trained.",
            config="",
            refuses=_alone(_NO_ADAPTER),
        ),
        Method(name="lora", idea="A low-rank update B A beside each frozen weight, A random and B zero."),
        Method(
            name="adalora",
            idea="Updates in SVD form whose least important directions are cut while training.",
            layers=_MATRICES,
            config="evatune.adapters.configs:adalora",
            callbacks=("evatune.training.adalora:AdaLoraCallback",),
            reads_gradients=True,
            refuses=_alone("learns a singular value decomposition whose ranks change in training")
            | {"qlora": "is tested with full-precision weights only"},
        ),
        Method(
            name="pissa",
            idea="A and B start as the principal components of the weight, the frozen rest is what remains.",
            changes_base=True,
            layers=_MATRICES,
            vectors=1,
            settings={"init_lora_weights": "pissa"},
            refuses=_CHANGES_BASE,
        ),
        Method(
            name="milora",
            idea="A and B start as the minor components of the weight, so training leaves the principal ones alone.",
            changes_base=True,
            layers=_MATRICES,
            vectors=1,
            start="evatune.adapters.starts:milora",
            refuses=_CHANGES_BASE,
        ),
        Method(
            name="olora",
            idea="B and A start as the first columns of Q and rows of R in the weight's QR decomposition.",
            changes_base=True,
            layers=("Linear",),
            vectors=1,
            settings={"init_lora_weights": "olora"},
            refuses=_CHANGES_BASE,
        ),
        Method(
            name="lora-ga",
            idea="A and B start as singular vectors of the loss gradient, so the first steps follow full fine-tuning.",
            needs_batches=True,
            needs_gradients=True,
            changes_base=True,
            layers=_MATRICES,
            vectors=2,
            settings={"init_lora_weights": "lora_ga"},
            start="evatune.adapters.starts:lora_ga",
            refuses={"qlora": _NEEDS_GRADIENT},
        ),
        Method(
            name="corda",
            idea="A and B start as components of the weight weighted by the covariance of its input.",
            needs_batches=True,
            changes_base=True,
            layers=_MATRICES,
            vectors=1,
            settings={"init_lora_weights": "corda"},
            start="evatune.adapters.corda:corda",
            refuses=_CHANGES_BASE,
        ),
        Method(
            name="vera",
            idea="Two random matrices, frozen and shared by all layers, between trained scaling vectors.",
            layers=_MATRICES,
            config="evatune.adapters.configs:vera",
            refuses=_alone(_FIXED_SCALE),
        ),
        Method(
            name="boft",
            idea="Each weight is multiplied by a trained orthogonal matrix in butterfly form.",
            layers=("Linear",),
            config="evatune.adapters.configs:boft",
            refuses=_alone(_FIXED_SCALE),
        ),
        Method(
            name="lora-one",
            idea="A and B start as the best low-rank step down the full gradient.",
            needs_batches=True,
            needs_gradients=True,
            layers=_MATRICES,
            vectors=1,
            start="evatune.adapters.starts:lora_one",
            refuses={"qlora": _NEEDS_GRADIENT},
        ),
        _eva(
            "eva",
            "A starts as the directions in which the input varies most, and they decide the ranks.",
            callbacks=("evatune.training.callbacks:require_eva",),
        ),
        _eva("eva-raw", "EVA with ranks by unnormalized variance.", metric="raw"),
        _eva("eva-max", "EVA with ranks by variance relative to the largest.", metric="max"),
        _eva("eva-whiten", "EVA with each row divided by the root of its singular value.", rows="whitened"),
        _eva("eva-rot", "EVA with the rows of each A rotated among themselves at random.", rows="rotated"),
        _eva("eva-perm", "EVA with the rows of each A in random order.", rows="permuted"),
        _eva("eva-shuffle", "EVA with each column of A shuffled, which spoils its directions.", rows="shuffled"),
        _eva(
            "eva-minor",
            "A starts as the directions in which the input varies least.",
            needs_all_components=True,
            measuring={"backend": "exact", "tau": None, "min_gain": None, "max_batches": 20},  # as in the paper
            start="evatune.adapters.starts:eva_minor",
        ),
        _eva(
            "eva-grad",
            "EVA with ranks by input variance times output-gradient energy.",
            needs_gradients=True,
            layers=_MATRICES,
            start="evatune.adapters.starts:eva_grad",
        ),
        _eva("lora-redist", "EVA's ranks, but a random A.", rows="random"),
    )
}
"""All starts by name."""

EXAMPLES = ("rslora", "lora+", "dora", "qlora", "eva+dora", "eva+rslora", "eva+lora+", "pissa+dora")
"""Combinations that help texts name."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a method's name means."""

    name: str
    """The name as it was given."""
    method: Method
    """The start."""
    options: frozenset[str]
    """The options added to it."""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of PEFT's configuration."""
        return dict(self.method.settings) | {
            key: value for name in sorted(self.options) for key, value in OPTIONS[name].settings.items()
        }

    @property
    def in_four_bits(self) -> bool:
        """Whether the frozen weights of the targets are held in 4 bits."""
        return any(OPTIONS[name].in_four_bits for name in self.options)

    @property
    def optimizing(self) -> str:
        """The option that brings an optimizer of its own; empty where the trainer's is taken."""
        return next((name for name in sorted(self.options) if OPTIONS[name].optimizer), "")

    @property
    def optimizer(self) -> str:
        """Home of the function that makes this optimizer, or empty."""
        return OPTIONS[self.optimizing].optimizer if self.optimizing else ""


def check_train_a(choice: Choice, *, train_a: bool) -> None:
    """Check that a method can do what `train_a` says.

    Raises:
        EvaError: `A` is to be frozen, and the method has none or sets its learning rate.
    """
    if train_a:
        return
    if not choice.method.is_lora:
        raise EvaError(f"method {choice.name!r} has no A to freeze; leave out train_a=False (--no-train-a).")
    if choice.optimizing:
        raise EvaError(
            f"{choice.optimizing} sets the learning rates of A and B apart; with a frozen A (train_a=False, "
            "--no-train-a) it does nothing."
        )


def check_takes_plan(choice: Choice) -> None:
    """Check that a plan that was made before can decide the ranks of a method.

    Raises:
        EvaError: it redistributes no ranks, or by gradients too.
    """
    if not choice.method.takes_plan:
        able = ", ".join(name for name, method in METHODS.items() if method.takes_plan)
        raise EvaError(f"method {choice.name!r} takes no plan made before; leave it out, or take {able}.")


def parse_method(name: str) -> Choice:
    """Read a method's name.

    Args:
        name: a start, an option, or a start and options joined by plus signs, in any order.

    Raises:
        EvaError: an unknown part, two starts, or an option that makes no sense with the start.

    Example:
        >>> parse_method("eva+lora+").method.name
        'eva'
    """
    parts: list[str] = []
    for part in str(name).lower().split("+"):
        if not part and parts and parts[-1] == "lora":
            parts[-1] = "lora+"  # the plus that ends `lora+`
        else:
            parts.append(part)
    for part in parts:
        if part not in METHODS and part not in OPTIONS:
            known = [*METHODS, *OPTIONS, *EXAMPLES]
            raise EvaError(
                f"there is no method {str(name)!r}{near_misses(part or str(name), known)}; "
                f"methods are {', '.join(METHODS)}, and {', '.join(OPTIONS)} alone or behind a plus."
            )
    starts = [part for part in parts if part in METHODS]
    options = [part for part in parts if part in OPTIONS]
    if len(starts) > 1:
        raise EvaError(
            f"method {name!r} names {len(starts)} starts, {' and '.join(starts)}: A can start in one way only."
        )
    if len(set(options)) < len(options):
        raise EvaError(f"method {name!r} names an option twice.")
    method = METHODS[starts[0] if starts else "lora"]
    for option in options:
        if option in method.refuses:
            raise EvaError(
                f"method {name!r} makes no sense: {method.name} {method.refuses[option]}, but {option} "
                f"{OPTIONS[option].idea}."
            )
    return Choice(name=str(name), method=method, options=frozenset(options))
