"""The options of `measure`, by what they decide; `Measuring` has all of them side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from evatune.errors import EvaError
from evatune.settings.section import Section, number

IGNORED_LABEL = -100
"""The label that the losses of PyTorch and transformers ignore."""

DEFAULT_COMPONENTS = 32
"""Number of components kept if no rank is given: as many as a plan with rank 16 and rho 2 needs."""

Metric = Literal["ratio", "paper", "raw", "max", "sum"]
Budget = Literal["components", "parameters"]
Backend = Literal["auto", "exact", "sketch", "incremental"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Targets(Section):
    """Which modules get an adapter, with the names and meanings of PEFT's `LoraConfig`."""

    target_modules: str | Sequence[str] = "all-linear"
    """Names or name endings of the adapted modules, one regular expression for the whole name, or `all-linear`."""
    exclude_modules: str | Sequence[str] | None = None
    """Names or name endings of modules, or a regular expression for them, that stay without adapter."""
    layers_to_transform: int | Sequence[int] | None = None
    """Only the layers with these numbers, where `target_modules` are names or `all-linear`."""
    layers_pattern: str | Sequence[str] | None = None
    """Name of the list of layers, where it is not the first numbered one."""
    target_parameters: Sequence[str] | None = None
    """Names or name endings of parameters that hold the weights of all experts of a layer, beside `target_modules`,
    which may then be empty."""


@dataclass(frozen=True, kw_only=True)
class Ranking(Section):
    """What decides the rank of each target (Section 3.3 of the paper)."""

    rank: int | Mapping[str, int] = number(16, low=1)
    """Average rank; the budget is this times the number of targets."""
    rho: float = number(2.0, low=1)
    """No target gets more than rho times the average rank; 1 keeps the ranks uniform."""
    metric: Metric = "ratio"
    """Explained-variance metric by which components compete for the budget."""
    budget: Budget = "components"
    """What is redistributed: components, or trainable parameters, of which a component of a wide layer costs more."""
    train_a: bool = True
    """Train A as well as B; without it, A stays where it started, and only B counts as trainable parameters."""


@dataclass(frozen=True, kw_only=True)
class Planning(Ranking):
    """What a plan depends on beside the spectra: what decides ranks, and what decides the scale."""

    lora_alpha: float | Mapping[str, float] = number(1.0, above=0)
    """Scale of the adapter at the average rank; the paper uses 1 throughout."""
    use_rslora: bool = False
    """Scale the adapter by alpha / sqrt(rank) instead of alpha / rank."""


@dataclass(frozen=True, kw_only=True)
class Stopping(Section):
    """When measuring ends: at `max_batches`, or when every input is done by one of two rules."""

    max_batches: int = number(64, low=1)
    """Stop after this many batches, converged or not."""
    tau: float | None = number(0.99, above=0, high=1)
    """A component has converged when its cosine with itself one batch before is at least this (the paper's rule);
    `none` for no rule."""
    delta: float = number(1.0, above=0, high=1)
    """Share of the components of an input that must have converged."""
    min_gain: float | None = number(0.02, above=0, below=1)
    """An input is also done when doubling the data would gain less than this share of captured variance on rows not
    seen yet; `none` for no rule."""

    @property
    def has_rule(self) -> bool:
        """Whether a stopping rule is on; if not, checks are skipped, since they cost factorizations."""
        return self.tau is not None or self.min_gain is not None


@dataclass(frozen=True, kw_only=True)
class Decomposition(Section):
    """How the principal components of the rows of an input are found."""

    n_components: int | None = number(None, low=1)
    """Components kept of each input; by default round(rho * rank) for the largest rank, or 32 without a rank."""
    backend: Backend = "auto"
    """Streaming PCA algorithm: `exact` second moments, a thin `sketch` of them, `incremental` as in Algorithm 2 of the
    paper, or the one that fits the width of each input."""
    tolerance: float | None = number(1e-3, above=0, below=1)
    """Share of captured variance that a sketch may miss before it gets wider or exact; `none` leaves it as it is."""
    center: bool = True
    """Subtract the mean of the activations, as Algorithm 2 of the paper does."""


@dataclass(frozen=True, kw_only=True)
class Rows(Section):
    """Which rows of a batch count."""

    use_label_mask: bool = False
    """Leave out the positions that the loss ignores (for example prompts)."""


@dataclass(frozen=True, kw_only=True)
class Measuring(Rows, Decomposition, Stopping, Targets, Ranking):
    """All options of `measure`.

    Rank, rho, metric, budget and `train_a` are those of the later plan: the stopping rules look only at the components
    that this plan would use if it were made from the current spectra.
    """

    rank: int | Mapping[str, int] | None = number(None, low=1)  # type: ignore[assignment]
    """Rank of the later plan, for all targets or by target name; without it, the rules look at all components."""
    dtype: Precision | None = None
    """Run the forward passes under autocast in this dtype; `auto` takes bfloat16 where it is fast, `none` runs the
    model as it is."""
    seed: int = number(0, low=0)
    """Seed of the sketches: equal rows and equal seed give equal components."""
    state_device: str | None = None
    """Where sums are kept and rows are multiplied; by default where the rows are. `cpu` spares the memory of an
    accelerator, at the price of copying every row."""

    def __post_init__(self) -> None:
        # Both may be objects of PyTorch: torch.bfloat16, torch.device("cpu").
        if self.dtype is not None:
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        if self.state_device is not None:
            object.__setattr__(self, "state_device", str(self.state_device))
        super().__post_init__()
        check_kept(self.n_components, self.rank, self.rho)

    @property
    def n_kept(self) -> int:
        """How many components are kept of each input, where it is wide enough."""
        if self.n_components is not None:
            return self.n_components
        return DEFAULT_COMPONENTS if self.rank is None else max_components(_largest(self.rank), self.rho)


def max_components(rank: int, rho: float) -> int:
    """Return how many components a target of rank r may get at most: round(rho * r), halves up."""
    return int(rho * rank + 0.5)


def check_kept(n_components: int | None, rank: int | Mapping[str, int] | None, rho: float) -> None:
    """Check that a number of components that was asked for is enough for a plan.

    Raises:
        EvaError: it is not.
    """
    if n_components is None or rank is None:
        return
    most = _largest(rank)
    needed = max_components(most, rho)
    if n_components < needed:
        raise EvaError(f"n_components is {n_components}, but rank {most} with rho {rho:g} needs at least {needed}.")


def _largest(rank: int | Mapping[str, int]) -> int:
    return max(rank.values(), default=0) if isinstance(rank, Mapping) else rank
