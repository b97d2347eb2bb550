"""Rank allocation: redistribute a budget of LoRA ranks over all targets by explained variance (Section 3.3).

Shapes: k components of one target, N targets. This module works on numbers, not on models or tensors.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evatune.errors import EvaError
from evatune.settings import Planning, max_components, takes
from evatune.tables import text_table

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class ComponentVariances:
    """What allocation needs to know of one target."""

    explained_variance: Array
    """λ = σ² / (M - 1) of each kept component of its input, descending, (k,)."""
    total_variance: float
    """Sum of the variances of all features of its input."""
    n_rows: int
    """M, how many rows its input had."""
    in_features: int
    """Width of its input."""
    out_features: int
    """Width of its output."""


def _ratio(target: ComponentVariances) -> Array:
    """Share of the input's total variance: σ² / ((M - 1) · total variance), the authors' code."""
    return target.explained_variance / target.total_variance


def _paper(target: ComponentVariances) -> Array:
    """Equation 3 literally: σ² / ((M - 1) · ‖σ‖₁), where ‖σ‖₁ is the ℓ1 norm of the kept singular values."""
    singular_values = np.sqrt(target.explained_variance * (target.n_rows - 1))
    return target.explained_variance / singular_values.sum()


def _raw(target: ComponentVariances) -> Array:
    """The eigenvalues λ themselves (EVA-Raw, Table 20)."""
    return target.explained_variance


def _max(target: ComponentVariances) -> Array:
    """Eigenvalues divided by the largest one of the same input (EVA-Max, Table 20)."""
    return target.explained_variance / target.explained_variance.max()


def _sum(target: ComponentVariances) -> Array:
    """Eigenvalues divided by the sum of the kept ones of the same input."""
    return target.explained_variance / target.explained_variance.sum()


METRICS: dict[str, Callable[[ComponentVariances], Array]] = {
    "ratio": _ratio,
    "paper": _paper,
    "raw": _raw,
    "max": _max,
    "sum": _sum,
}
"""How components of different targets are compared."""


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """How many components each target gets, and the alpha that keeps its scale."""

    ranks: dict[str, int]
    """Rank of each target, in the order of the model; a target with rank 0 gets no adapter."""
    alphas: dict[str, float]
    """lora_alpha of each target: alpha · r_new / r, under rsLoRA alpha · √(r_new / r) (Section 4.1 of the paper)."""
    base_ranks: dict[str, int]
    """Rank of each target in uniform LoRA."""
    explained: dict[str, float]
    """Share of the variance of its input that the components of each target explain; without those that are unknown."""
    in_features: dict[str, int]
    """Width of the input of each target."""
    out_features: dict[str, int]
    """Width of the output of each target."""
    rho: float
    """A target gets at most round(rho * r) components."""
    metric: str
    """How components were compared."""
    use_rslora: bool = False
    """Whether scale is alpha / √r instead of alpha / r."""
    budget_in: str = "components"
    """Unit of the budget: `components`, or trainable `parameters`."""
    train_a: bool = True
    """Whether A is trained as well as B; if A is frozen, only the parameters of B count."""

    @property
    def budget(self) -> int:
        """The budget in components: the sum of the ranks of uniform LoRA."""
        return sum(self.base_ranks.values())

    @property
    def total(self) -> int:
        """The sum of the planned ranks; equal to a budget in components unless all targets are at their limits."""
        return sum(self.ranks.values())

    @property
    def n_parameters(self) -> int:
        """Trainable parameters of the adapter: Σ r (in + out), or Σ r · out if A is frozen."""
        return self._count(self.ranks)

    @property
    def uniform_parameters(self) -> int:
        """Trainable parameters of uniform LoRA with the same budget."""
        return self._count(self.base_ranks)

    def _count(self, ranks: Mapping[str, int]) -> int:
        return sum(
            rank * _n_trainable(self.in_features[name], self.out_features[name], train_a=self.train_a)
            for name, rank in ranks.items()
        )

    def table(self) -> str:
        """Return a table with one line for each kind of matrix, and the totals below."""
        groups: dict[str, list[str]] = {}
        for name in self.ranks:
            groups.setdefault(name.rsplit(".", 1)[-1], []).append(name)
        rows = []
        for kind, names in groups.items():
            ranks = [self.ranks[name] for name in names]
            change = sum(ranks) - sum(self.base_ranks[name] for name in names)
            known = [self.explained[name] for name in names if name in self.explained]
            explained = f"{np.mean(known):.3f}" if known else "–"
            rows.append([kind, len(names), min(ranks), f"{np.mean(ranks):.1f}", max(ranks), f"{change:+d}", explained])
        headers = ["matrix", "targets", "least", "mean rank", "most", "change", "explained"]
        relative = self.n_parameters / self.uniform_parameters - 1
        unit = "" if self.budget_in == "components" else f", budget in {self.budget_in}"
        of_b = "" if self.train_a else " of B"
        n_without = Counter(self.ranks.values())[0]
        lines = [
            text_table(headers, rows),
            "",
            f"{self.total:,} of {self.budget:,} components over {len(self.ranks)} targets"
            f" (rho {self.rho:g}, metric {self.metric}{unit}), {n_without} targets without an adapter",
            f"{self.n_parameters:,} trainable parameters{of_b}, {relative:+.1%} against uniform ranks",
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the plan for programs; `from_json` reads it."""
        return asdict(self) | {
            "budget": self.budget,
            "total": self.total,
            "n_parameters": self.n_parameters,
            "uniform_parameters": self.uniform_parameters,
        }

    def settings(self) -> dict[str, Any]:
        """Return the options of `allocate` that made it, as far as they are the same for all targets."""
        ranks = set(self.base_ranks.values())
        power = 0.5 if self.use_rslora else 1.0
        alphas = {
            round(alpha * (self.base_ranks[name] / self.ranks[name]) ** power, 9)
            for name, alpha in self.alphas.items()
            if self.ranks[name]
        }
        same = {"rank": ranks, "lora_alpha": alphas}
        return {name: values.pop() for name, values in same.items() if len(values) == 1} | {
            "rho": self.rho,
            "metric": self.metric,
            "budget": self.budget_in,
        }

    @classmethod
    def load(cls, path: str | Path) -> RankPlan:
        """Read the plan that `evatune plan --save` or a run wrote.

        Raises:
            EvaError: the file is missing or holds no plan.
        """
        if not Path(path).is_file():
            raise EvaError(f"there is no plan {path}; `evatune plan SPECTRA --save FILE` writes one.")
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            if not isinstance(data, dict):
                raise EvaError(f"this is not a rank plan: it holds a {type(data).__name__}.")
            return cls.from_json(data)
        except (ValueError, EvaError) as error:
            raise EvaError(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RankPlan:
        """Return the plan that `to_json` wrote.

        Raises:
            EvaError: an entry is missing, or a rank is no whole number.
        """
        try:
            required = {"ranks", "alphas", "base_ranks", "explained", "in_features", "out_features", "rho", "metric"}
            plan = cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data or name in required})
        except KeyError as error:
            raise EvaError(f"this is not a rank plan: the entry {error} is missing.") from None
        for entry in ("ranks", "alphas", "base_ranks", "in_features", "out_features"):
            value = getattr(plan, entry)
            if not isinstance(value, dict) or value.keys() != plan.ranks.keys():
                raise EvaError(f"the entry {entry!r} of the plan does not name the same targets as its ranks.")
        for name, rank in plan.ranks.items():
            if type(rank) is not int or rank < 0:
                raise EvaError(f"the plan gives {name!r} rank {rank!r}, but a rank is a whole number of at least 0.")
        return plan


def _n_trainable(in_features: int, out_features: int, *, train_a: bool) -> int:
    """Return the trainable parameters of one component: a column of B, and a row of A if A is trained."""
    return (in_features if train_a else 0) + out_features


@takes(Planning)
def allocate(
    targets: Mapping[str, ComponentVariances],
    *,
    weights: Mapping[str, float] | None = None,
    settings: Planning | None = None,
    **options: Any,
) -> RankPlan:
    """Select the Σ r components with the highest scores over all targets, at most round(rho * r) of one target.

    With a budget in parameters, a component of a target costs in_features + out_features, the budget is the number of
    parameters of uniform LoRA, and components are sorted by score per parameter; one that costs more than what is left
    of the budget is skipped. Only trained parameters count: if A is frozen (`train_a=False`), a component costs
    out_features, the column of B, and the budget is the number of parameters of uniform LoRA's B.

    Equal scores are ordered by component number, then by the order of the targets. So equal targets get equal ranks,
    unless the budget ends among them. Components of an input without variance have score zero.

    Args:
        targets: variances by target name, in the order of the model.
        weights: factor on the scores of each target, by name; by default 1.
        settings: all options in one object; the options below change it.
        options: see the list below. `rank` and `lora_alpha` are one number for all targets, or by target name.

    Returns:
        The plan.

    Raises:
        EvaError: no targets, a value out of range, a target missing from a mapping, or too few components kept.

    Cost: O(N k log(N k)).
    """
    if not targets:
        raise EvaError("there are no targets to allocate ranks to.")
    settings = Planning.of(options, settings=settings, call="evatune.allocation.allocate")
    rho, metric, train_a = settings.rho, settings.metric, settings.train_a
    counts_parameters = settings.budget == "parameters"
    base_ranks = _per_target(settings.rank, targets, "rank")
    base_alphas = _per_target(settings.lora_alpha, targets, "lora_alpha")
    caps = {name: min(max_components(base_ranks[name], rho), target.in_features) for name, target in targets.items()}
    for name, target in targets.items():
        n_kept = len(target.explained_variance)
        if n_kept < caps[name]:
            raise EvaError(
                f"rank {base_ranks[name]} with rho {rho:g} needs {caps[name]} components, but {n_kept} were kept of "
                f"{name}; measure with n_components={caps[name]} or plan with a smaller rank or rho."
            )
    costs = {
        name: _n_trainable(target.in_features, target.out_features, train_a=train_a) if counts_parameters else 1
        for name, target in targets.items()
    }
    factors = _per_target(1.0 if weights is None else weights, targets, "weights")
    scores = np.concatenate(
        [_scores(metric, target)[: caps[name]] * factors[name] / costs[name] for name, target in targets.items()]
    )
    component = np.concatenate([np.arange(cap) for cap in caps.values()])
    owner = np.repeat(np.arange(len(caps)), list(caps.values()))
    order = np.lexsort((owner, component, -scores))
    ranks = _spend(owner[order], costs, available=sum(base_ranks[name] * cost for name, cost in costs.items()))
    power = 0.5 if settings.use_rslora else 1.0
    return RankPlan(
        ranks=ranks,
        alphas={name: float(base_alphas[name] * (ranks[name] / base_ranks[name]) ** power) for name in targets},
        base_ranks=base_ranks,
        explained={name: _explained(target, ranks[name]) for name, target in targets.items()},
        in_features={name: target.in_features for name, target in targets.items()},
        out_features={name: target.out_features for name, target in targets.items()},
        rho=rho,
        metric=metric,
        use_rslora=settings.use_rslora,
        budget_in=settings.budget,
        train_a=train_a,
    )


def _spend(owners: Array, costs: Mapping[str, int], *, available: int) -> dict[str, int]:
    """Return the ranks after selecting components in this order; one that costs more than what is left is skipped.

    All components of one target cost the same, so after a skipped one all later ones of that target are skipped too.
    """
    names = list(costs)
    ranks = dict.fromkeys(names, 0)
    for owner in owners.tolist():
        name = names[owner]
        if costs[name] <= available:
            available -= costs[name]
            ranks[name] += 1
    return ranks


def _scores(metric: str, target: ComponentVariances) -> Array:
    """Return the scores of one target, non-increasing; zeros if its input has no variance."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.nan_to_num(METRICS[metric](target), nan=0.0, posinf=0.0, neginf=0.0)
    # Despite rounding, a later component of a target must not score higher than an earlier one.
    return np.minimum.accumulate(np.maximum(scores, 0.0))


def _explained(target: ComponentVariances, rank: int) -> float:
    """Return the share of an input's variance that its leading components explain."""
    share = _ratio(target)[:rank].sum() if target.total_variance > 0 else 0.0
    return float(min(share, 1.0))


def _per_target(value: Any, targets: Mapping[str, Any], what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return dict.fromkeys(targets, value)
    missing = [name for name in targets if name not in value]
    if missing:
        raise EvaError(f"{what} names no value for {len(missing)} targets, the first {missing[0]!r}.")
    return {name: value[name] for name in targets}
