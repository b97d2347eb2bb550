"""The kinds of streaming PCA, by the name that their states carry."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from evatune.errors import EvaError
from evatune.pca.contract import AnyPCA, read_name
from evatune.pca.one_hot import OneHotPCA
from evatune.pca.stacked import StackedPCA
from evatune.pca.streaming import StreamingPCA

KINDS: dict[str, type[AnyPCA]] = {kind.kind: kind for kind in (StreamingPCA, OneHotPCA, StackedPCA)}


def from_state(state: Mapping[str, Tensor]) -> AnyPCA:
    """Return the PCA, of whichever kind, whose `state_dict` this is.

    Raises:
        EvaError: it is not the state of any kind.
    """
    name = read_name(state["kind"]) if "kind" in state else "none"
    if name not in KINDS:
        raise EvaError(f"this is not a state of a streaming PCA: its kind is {name!r}, not one of {', '.join(KINDS)}.")
    return KINDS[name].from_state(state)
