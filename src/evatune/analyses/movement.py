"""How far adapters are from each other: before and after training, and between methods (Tables 7 and 8).

Letters: k rank, d input features, m output features. The saved adapter of a method that changes the base weights is
converted: the first half of its rows is what was trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

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


def distances(first: str | Path, last: str | Path) -> dict[str, Distance]:
    """Return how far the matrices A of two adapters are from each other, for each target of the same rank.

    Args:
        first: folder of an adapter, such as the initial one.
        last: folder of another one, such as the same after training.

    Raises:
        EvaError: one is no LoRA adapter, or they have no target of the same shape in common.
    """
    old, new = read_factors(first), read_factors(last)
    found = {}
    for name in old:
        before, after = old[name][0], new[name][0] if name in new else None
        if after is not None and len(after) >= len(before) and after.shape[1] == before.shape[1]:
            if len(after) == 2 * len(before):  # converted
                after = after[: len(before)]
            if after.shape == before.shape:
                found[name] = Distance(
                    spectral_norm=float(torch.linalg.matrix_norm(after - before, ord=2)),
                    cosine=float(torch.cosine_similarity(before.flatten(), after.flatten(), dim=0)),
                )
    if not found:
        raise EvaError(f"the adapters in {first} and {last} have no target of the same shape in common.")
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
    values = torch.eye(len(factors), dtype=torch.float64)
    for one in range(len(factors)):
        for other in range(one):
            cosines = [_product_cosine(factors[one][name], factors[other][name]) for name in sorted(names)]
            values[one, other] = values[other, one] = sum(cosines) / len(cosines)
    return values


def _product_cosine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Return the cosine of two products B A as vectors, without forming them."""

    def inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
        return float(((one[1].T @ other[1]) * (one[0] @ other[0].T)).sum())

    size = (inner(first, first) * inner(second, second)) ** 0.5
    return inner(first, second) / size if size else 0.0
