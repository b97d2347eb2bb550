"""How far adapters are from each other: before and after training, and between methods (Tables 7 and 8).

Letters: k rank, d input features, m output features. The saved adapter of a method that changes the base weights is
converted: the first half of its rows is what was trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from safetensors import safe_open
from torch import Tensor

from evatune.analyses.subspaces import symmetric
from evatune.errors import EvaError
from evatune.files import check_tensors

_FACTOR = re.compile(r"(?:base_model\.model\.)?(.*)\.lora_(A|B)(?:\.default)?\.weight")


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far two matrices A of one target are from each other."""

    spectral_norm: float
    """Largest singular value of their difference."""
    cosine: float
    """Cosine of the two as vectors."""


def read_factors(folder: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A (k, d) and B (m, k) of each target of a saved LoRA adapter, in double precision.

    Raises:
        EvaError: the folder holds no such adapter.
    """
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise EvaError(f"{folder} holds no adapter: it has no {path.name}.")
    check_tensors(path)
    found: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if match := _FACTOR.fullmatch(name):
                found.setdefault(match[1], {})[match[2]] = file.get_tensor(name).double()
    factors = {name: (pair["A"], pair["B"]) for name, pair in found.items() if pair.keys() == {"A", "B"}}
    if not factors:
        raise EvaError(f"the adapter in {folder} has no matrices A and B, so it is not LoRA.")
    return factors


def read_a(folder: str | Path, *, initial: str | Path | None = None) -> dict[str, Tensor]:
    """Return A (k, d) of each target of a saved LoRA adapter, in double precision.

    Args:
        folder: the adapter.
        initial: the same adapter before training; a converted one is cut to its rank.

    Raises:
        EvaError: a folder holds no such adapter.
    """
    ranks = {name: len(a) for name, a in read_a(initial).items()} if initial is not None else {}
    return {name: a[: ranks.get(name)] for name, (a, _) in read_factors(folder).items()}


def distances(first: Mapping[str, Tensor], last: Mapping[str, Tensor]) -> dict[str, Distance]:
    """Return how far the matrices A of two adapters are from each other, for each target where both have one shape.

    Args:
        first: A (k, d) by target, such as those before training; see `read_a`.
        last: those of another adapter, such as the same after training.

    Raises:
        EvaError: they have no target of the same shape in common.
    """
    found = {
        name: Distance(
            spectral_norm=float(torch.linalg.matrix_norm(last[name] - before, ord=2)),
            cosine=float(torch.cosine_similarity(before.flatten(), last[name].flatten(), dim=0)),
        )
        for name, before in first.items()
        if name in last and last[name].shape == before.shape
    }
    if not found:
        raise EvaError("the two adapters have no target of the same shape in common.")
    return found


def update_cosines(adapters: Mapping[str, str | Path]) -> Tensor:
    """Return the mean cosine of the trained updates B A of adapters, for each pair.

    Args:
        adapters: folders of trained adapters of one model, by label.

    Raises:
        EvaError: one is no LoRA adapter, or they have no target in common.
    """
    factors = [read_factors(folder) for folder in adapters.values()]
    names = set.intersection(*(set(one) for one in factors))
    if not names:
        raise EvaError(f"the adapters of {', '.join(adapters)} have no target in common.")

    def mean_cosine(one: int, other: int) -> float:
        return fmean(_product_cosine(factors[one][name], factors[other][name]) for name in sorted(names))

    return symmetric(len(factors), mean_cosine)


def _product_cosine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Return the cosine of two products B A as vectors, without forming them."""

    def inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
        return float(((one[1].T @ other[1]) * (one[0] @ other[0].T)).sum())

    size = (inner(first, first) * inner(second, second)) ** 0.5
    return inner(first, second) / size if size else 0.0
