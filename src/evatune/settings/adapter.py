"""The options of an adapter: what `prepare`, the recipe's section `adapter` and the command line share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evatune.settings.measuring import Measuring, Planning, Ranking, Targets
from evatune.settings.section import Section, number, same_as


@dataclass(frozen=True, kw_only=True)
class Start(Section):
    """How the adapter starts."""

    method: str = "eva"
    """`eva`, `lora`, `pissa`, ... with options behind a plus: `eva+dora`; `evatune methods` lists them all."""


@dataclass(frozen=True, kw_only=True)
class Adapter(Targets, Ranking, Start):
    """The adapter and how it starts."""

    rank: int = same_as(Ranking, "rank")
    lora_alpha: float = same_as(Planning, "lora_alpha")
    lora_dropout: float = number(0.0, low=0, below=1)
    """Share of the adapter's inputs that is zeroed in training."""
    bias: Literal["none", "all"] = "none"
    """Train all biases of the model too, and save them with the adapter."""
    block_size: int = number(4, low=1)
    """Size of the blocks of BOFT."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the adapter's weights are held and trained in; `bfloat16` halves them and the optimizer's moments."""


@dataclass(frozen=True, kw_only=True)
class Gradients(Section):
    """What the methods that look at gradients take."""

    gradient_batches: int = number(8, low=1)
    """Batches that the methods which look at gradients take them of (lora-ga, lora-one, eva-grad)."""


@dataclass(frozen=True, kw_only=True)
class Preparing(Adapter, Gradients, Measuring):
    """All options of `prepare`: the adapter, and how its method looks at data."""

    seed: int = number(0, low=0)
    """Seed of everything random: matrices, sketches, the order of what is measured."""
