"""Experts that are separate linear layers and got too few rows, or none: which spectrum they get instead.

A router sends only some rows to each expert, so on downstream data some experts see fewer rows than components are
asked for. The explained variance of a few rows says nothing (one component explains two rows completely). So:

- the layers that the routed rows enter (gate and up) take the spectrum of all experts of that block together: all of
  them see hidden states, one space;
- a layer behind these (down) has a space of its own. It keeps the directions of its own rows, completed at random as
  LoRA starts, and gets the mean variances of its siblings, so that its rank stays about theirs.

Fused experts follow their own rule, in `evatune.activations.layers.experts`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from evatune.activations.layer_type import EXPERT, TargetModule
from evatune.pca import AnyPCA
from evatune.pca.subspace import complete_basis
from evatune.settings import Reason
from evatune.spectra import Spectrum


def stand_ins(
    targets: Mapping[str, TargetModule],
    pcas: Mapping[str, AnyPCA],
    input_of: Mapping[str, str],
    *,
    n_components: int,
    n_batches: int,
) -> dict[str, Spectrum]:
    """Return a spectrum for every expert layer with fewer rows than components, if siblings of it have enough rows.

    Args:
        targets: all targets by name.
        pcas: what was measured, by input.
        input_of: the input of every target that was reached, in the order of calls.
        n_components: how many components were asked for.
        n_batches: how many batches were passed.

    Returns:
        Spectra by input; the input of a target that was never reached has the target's own name.
    """
    families: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, target in targets.items():
        match = EXPERT.fullmatch(name)
        if match and target.layer.is_linear:
            families[match["group"], match["part"]].append(name)
    enters = _entered_parts(input_of)
    found = {}
    for family, names in families.items():
        k = min(n_components, targets[names[0]].in_features)
        keys = {name: input_of.get(name, name) for name in names}
        fed: dict[str, AnyPCA] = {}
        starved: dict[str, AnyPCA | None] = {}
        for key in keys.values():
            pca = pcas.get(key)
            own = pca if pca is not None and pca.is_fitted else None
            if own is not None and own.n_samples_seen_ >= k:
                fed[key] = own
            else:
                starved[key] = own
        if not fed or not starved:
            continue
        pooled = _pooled([*fed.values(), *(own for own in starved.values() if own)]) if family in enters else None
        for number, (key, own) in enumerate(starved.items()):
            found[key] = (
                _spectrum_of(pooled, n_batches)
                if pooled
                else _like_siblings(own, list(fed.values()), number, n_batches)
            )
    return found


def _entered_parts(input_of: Mapping[str, str]) -> set[tuple[str, str]]:
    """Return the parts of experts, with their group, that routed rows enter: the first called, and those sharing it."""
    first: dict[tuple[str, str], str] = {}
    entered = set()
    for name, key in input_of.items():
        match = EXPERT.fullmatch(name)
        if match and first.setdefault((match["group"], match["number"]), key) == key:
            entered.add((match["group"], match["part"]))
    return entered


def _pooled(pcas: list[AnyPCA]) -> AnyPCA:
    pooled, *others = pcas
    for pca in others:
        pooled = pooled.merge(pca)
    return pooled


def _spectrum_of(pca: AnyPCA, n_batches: int) -> Spectrum:
    return Spectrum(
        components=pca.components_.float().cpu().clone(),  # several experts may stand in with one PCA
        singular_values=pca.singular_values_.float().cpu().clone(),
        mean=pca.mean_.float().cpu().clone(),
        total_variance=pca.total_variance_,
        n_rows=pca.n_samples_seen_,
        n_batches=n_batches,
        stopped=Reason.TOO_FEW_ROWS,
        backend="pooled experts",
    )


def _like_siblings(own: AnyPCA | None, fed: list[AnyPCA], number: int, n_batches: int) -> Spectrum:
    like = fed[0].components_.float().cpu()
    k, d = like.shape
    n_rows = own.n_samples_seen_ if own else 0
    variance_k = torch.stack([pca.explained_variance_.float().cpu() for pca in fed]).mean(dim=0)
    return Spectrum(
        components=own.components_.float().cpu() if own else complete_basis(like.new_zeros(d, 0), k, seed=number).T,
        singular_values=(variance_k * max(n_rows - 1, 1)).sqrt(),
        mean=own.mean_.float().cpu() if own else like.new_zeros(d),
        total_variance=sum(pca.total_variance_ for pca in fed) / len(fed),
        n_rows=n_rows,
        n_batches=n_batches,
        stopped=Reason.TOO_FEW_ROWS,
        backend="mean of experts",
    )
