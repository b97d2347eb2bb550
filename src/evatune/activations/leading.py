"""What processes tell each other of an input: its leading components, or the whole state.

Shapes: d features, k components, p >= k components.

Before the end, merged components only decide when to stop, and the k leading ones of each process, their variances and
the mean are enough: (k + 1) d numbers instead of the (d, l) or (d, d) of the state, in full precision, because one
massive component rounded to 16 bits would look like new directions.

At the end processes exchange whole states, so that nothing more is lost than in one process. Only where the exact
second moment was chosen for its speed (backend "auto") and is much wider than a sketch would be, the p leading
components of each process stand for it, as they do when sketches merge.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evatune.activations.layers import AnyPCA
from evatune.pca import StreamingPCA
from evatune.pca.one_hot import OneHotPCA
from evatune.pca.stacked import StackedPCA

PART = "part."
SPARE = 4
"""How many times k components are kept while states are merged."""


def whole_state(pca: AnyPCA) -> dict[str, Tensor]:
    """Return all that matters of what a process has measured of an input, as tensors; nothing more is added then."""
    if isinstance(pca, StackedPCA):
        return _stacked(pca, whole_state)
    pca.refresh()
    if isinstance(pca, StreamingPCA) and (pca.backend, pca.backend_) == ("auto", "exact"):
        n_pairs = max(2 * pca.n_components, pca.n_components + 48)
        if 2 * n_pairs < pca.n_features_in_:
            wide = StreamingPCA(n_pairs, center=pca.center).load_state_dict(pca.state_dict())
            return leading_state(wide) | {"n_components": torch.tensor(pca.n_components)}
    return pca.state_dict()


def leading_state(pca: AnyPCA) -> dict[str, Tensor]:
    """Return the leading components of what a process has measured of an input, as tensors."""
    if isinstance(pca, OneHotPCA):  # counts are smaller than components
        return pca.state_dict()
    if isinstance(pca, StackedPCA):
        return _stacked(pca, leading_state)
    values_k = pca.singular_values_
    seen_k = values_k > 0  # the others were completed at random
    n_rows = pca.n_samples_seen_
    return {
        "leading": pca.components_[seen_k],
        "singular_values": values_k[seen_k],
        "mean": pca.mean_,
        "scatter": torch.tensor(pca.total_variance_ * max(n_rows - 1, 1), dtype=torch.float64),
        "center": torch.tensor(pca.center),
        "n_components": torch.tensor(pca.n_components),
        "n_samples_seen": torch.tensor(n_rows),
    }


def _stacked(pca: StackedPCA, state_of: Callable[[StreamingPCA], dict[str, Tensor]]) -> dict[str, Tensor]:
    # The numbers that describe the stack itself, without any part.
    state = {name: tensor for name, tensor in pca.state_dict().items() if not name.startswith(PART)}
    for number, part in enumerate(pca.parts):
        if part.is_fitted:
            state |= {f"{PART}{number}.{name}": tensor for name, tensor in state_of(part).items()}
    return state


def restored(state: dict[str, Tensor]) -> AnyPCA:
    """Return the PCA that a `whole_state` or a `leading_state` describes."""
    if "counts" in state:
        return OneHotPCA.from_state_dict(state)
    if "widths" in state:
        return StackedPCA.from_state_dict(_with_whole_parts(state))
    if "leading" in state:
        state = _whole(state)
    return StreamingPCA(int(state["n_components"]), center=bool(state["center"])).load_state_dict(state)


def _with_whole_parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    parts: dict[str, dict[str, Tensor]] = {}
    whole = {}
    for name, tensor in state.items():
        if name.startswith(PART):
            _, number, entry = name.split(".", 2)
            parts.setdefault(number, {})[entry] = tensor
        else:
            whole[name] = tensor
    for number, part in parts.items():
        part = _whole(part) if "leading" in part else part
        whole |= {f"{PART}{number}.{entry}": tensor for entry, tensor in part.items()}
    return whole


def _whole(leading: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a `StreamingPCA` that knows the leading components and nothing else."""
    k, center, mean_d = int(leading["n_components"]), bool(leading["center"]), leading["mean"]
    state = StreamingPCA(k, backend="incremental", center=center).partial_fit(mean_d[None]).state_dict()
    n_rows = leading["n_samples_seen"]
    return state | {
        "state.components": leading["leading"],
        "state.singular_values": leading["singular_values"],
        "state.n_components": torch.tensor(min(SPARE * k, len(mean_d))),
        "n_samples_seen": n_rows,
        "sum": n_rows * (mean_d - state["shift"]).to(state["sum"]),
        # Of the variance of each feature only the sum over all is asked for.
        "squares": torch.full_like(state["squares"], float(leading["scatter"]) / len(mean_d)),
    }
