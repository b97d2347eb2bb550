"""Every method by its name: what it is, what it needs, what it goes with. Imports neither torch nor peft.

A name is a start (`eva`, `pissa`, ...) and any options behind a plus: `eva+dora`, `pissa+rslora`, `eva+lora+`. An
option alone, `dora`, is that option on plain LoRA. `evatune.prepare` makes a model of a name; what a start does stands
in `evatune.adapters.starts`. A new method is one file there or in `evatune.initialization`, and one row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evatune.errors import EvaError, near_misses

OPTIONS = {
    "rslora": "scales the adapter by alpha / sqrt(rank) instead of alpha / rank",
    "dora": "trains magnitude and direction of each weight apart",
    "lora+": "gives B a higher learning rate than A",
    "qlora": "holds the frozen weights in 4 bits",
}
"""What can be added to a start with a plus, and stand alone as `lora` with it."""

_FIXED_SCALE = "has a scale and parameters of its own, not LoRA's A and B"
_NO_ADAPTER = "has no adapter: all weights are trained"
_NEEDS_FLOAT = "computes a new base weight, which 4 bits cannot hold exactly"
_NEEDS_GRADIENT = "needs the gradient of the weights, which 4-bit weights do not have"
_CHANGES_BASE = {"qlora": _NEEDS_FLOAT}


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
    needs_gradients: bool = False
    """Whether it computes the loss of batches and its gradient, for which spectra do not do."""
    changes_base: bool = False
    """Whether it takes the adapter's start out of the base weights; evatune saves such adapters converted."""
    peft_config: str = "LoraConfig"
    """The PEFT configuration it uses; none for full fine-tuning."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of that configuration."""
    start: str = ""
    """Function in `evatune.adapters.starts` that computes the start, where PEFT alone does not."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of that function."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Options that make no sense with it, and why."""


def _eva(name: str, idea: str, **options: Any) -> Method:
    return Method(
        name=name,
        idea=idea,
        needs_batches=True,
        needs_spectra=True,
        needs_gradients=options.pop("needs_gradients", False),
        start=options.pop("start", "eva"),
        options=options,
    )


def _alone(reason: str) -> dict[str, str]:
    return dict.fromkeys(OPTIONS, reason)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="full",
            idea="All weights of the model are trained.",
            peft_config="",
            refuses=_alone(_NO_ADAPTER),
        ),
        Method(name="lora", idea="A low-rank update B A beside each frozen weight, A random and B zero."),
        Method(
            name="adalora",
            idea="Updates in SVD form whose least important directions are cut while training.",
            peft_config="AdaLoraConfig",
            refuses=_alone("learns a singular value decomposition whose ranks change in training")
            | {"qlora": "is tested with full-precision weights only"},
        ),
        Method(
            name="pissa",
            idea="A and B start as the principal components of the weight, the frozen rest is what remains.",
            changes_base=True,
            settings={"init_lora_weights": "pissa"},
            refuses=_CHANGES_BASE,
        ),
        Method(
            name="milora",
            idea="A and B start as the minor components of the weight, so training leaves the principal ones alone.",
            changes_base=True,
            start="milora",
            refuses=_CHANGES_BASE,
        ),
        Method(
            name="olora",
            idea="B and A start as the first columns of Q and rows of R in the weight's QR decomposition.",
            changes_base=True,
            settings={"init_lora_weights": "olora"},
            refuses=_CHANGES_BASE,
        ),
        Method(
            name="lora-ga",
            idea="A and B start as singular vectors of the loss gradient, so the first steps follow full fine-tuning.",
            needs_batches=True,
            needs_gradients=True,
            changes_base=True,
            settings={"init_lora_weights": "lora_ga"},
            start="lora_ga",
            refuses={"qlora": _NEEDS_GRADIENT},
        ),
        Method(
            name="corda",
            idea="A and B start as components of the weight weighted by the covariance of its input.",
            needs_batches=True,
            changes_base=True,
            settings={"init_lora_weights": "corda"},
            start="corda",
            refuses=_CHANGES_BASE,
        ),
        Method(
            name="vera",
            idea="Two random matrices, frozen and shared by all layers, between trained scaling vectors.",
            peft_config="VeraConfig",
            refuses=_alone(_FIXED_SCALE),
        ),
        Method(
            name="boft",
            idea="Each weight is multiplied by a trained orthogonal matrix in butterfly form.",
            peft_config="BOFTConfig",
            refuses=_alone(_FIXED_SCALE),
        ),
        Method(
            name="lora-one",
            idea="A and B start as the best low-rank step down the full gradient.",
            needs_batches=True,
            needs_gradients=True,
            start="lora_one",
            refuses={"qlora": _NEEDS_GRADIENT},
        ),
        _eva("eva", "A starts as the directions in which the input varies most, and they decide the ranks."),
        _eva("eva-raw", "EVA with ranks by unnormalized variance.", metric="raw"),
        _eva("eva-max", "EVA with ranks by variance relative to the largest.", metric="max"),
        _eva("eva-whiten", "EVA with each row divided by the root of its singular value.", rows="whitened"),
        _eva("eva-rot", "EVA with the rows of each A rotated among themselves at random.", rows="rotated"),
        _eva("eva-perm", "EVA with the rows of each A in random order.", rows="permuted"),
        _eva("eva-shuffle", "EVA with each column of A shuffled, which spoils its directions.", rows="shuffled"),
        _eva("eva-minor", "A starts as the directions in which the input varies least.", start="eva_minor"),
        _eva(
            "eva-grad",
            "EVA with ranks by input variance times output-gradient energy.",
            start="eva_grad",
            needs_gradients=True,
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


def check_train_a(choice: Choice, *, train_a: bool) -> None:
    """Check that a method can do what `train_a` says.

    Raises:
        EvaError: `A` is to be frozen, and the method has none or sets its learning rate.
    """
    if train_a:
        return
    if choice.method.peft_config != "LoraConfig":
        raise EvaError(f"method {choice.name!r} has no A to freeze; leave out train_a=False (--no-train-a).")
    if "lora+" in choice.options:
        raise EvaError(
            "lora+ sets the learning rates of A and B apart; with a frozen A (train_a=False, --no-train-a) it does "
            "nothing."
        )


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
                f"{OPTIONS[option]}."
            )
    return Choice(name=str(name), method=method, options=frozenset(options))
