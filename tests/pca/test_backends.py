"""Every backend answers everything, and what users may ask for is what there is."""

from __future__ import annotations

import typing

import pytest
import torch

from evatune import EvaError, StreamingPCA
from evatune.pca import from_state
from evatune.pca.backends import BACKENDS, STATES, choose_backend
from evatune.pca.contract import name_tensor
from evatune.pca.kinds import KINDS
from evatune.settings import Measuring


def test_the_backends_of_the_settings_are_those_that_are_offered():
    assert typing.get_args(typing.get_type_hints(Measuring)["backend"]) == BACKENDS


@pytest.mark.parametrize("name", STATES)
def test_a_state_answers_everything_and_goes_through_its_tensors(name):
    """Also the one that only processes exchange."""
    rows = torch.randn(60, 300, generator=torch.Generator().manual_seed(0)).double()
    pca = StreamingPCA(4, backend="exact").partial_fit(rows)
    if name == "leading":
        pca = from_state(pca.state_dict()).condensed()
    else:
        pca = StreamingPCA(4, backend=name, seed=3).partial_fit(rows)
    assert pca.backend_ == name
    for other in (
        from_state(pca.state_dict()),
        pca.condensed(),
        pca.merge(from_state(pca.state_dict())),
    ):
        assert other.components_.shape == pca.components_.shape
        torch.testing.assert_close(other.mean_, pca.mean_)
        assert other.total_variance_ == pytest.approx(pca.total_variance_, rel=0.02)
    cost = STATES[name].cost(4, 300)
    assert cost.backend == name and 0 < cost.initial_bytes <= cost.state_bytes and cost.cached_bytes > 0


@pytest.mark.parametrize(
    ("asked", "n_features", "chosen"),
    [
        ("auto", 2048, "exact"),
        ("auto", 2049, "sketch"),
        ("sketch", 96, "exact"),
        ("sketch", 200, "sketch"),
        ("incremental", 96, "incremental"),
    ],
)
def test_which_backend_is_chosen(asked, n_features, chosen):
    assert choose_backend(asked, 8, n_features).name == chosen


def test_a_state_of_no_kind_is_refused():
    with pytest.raises(EvaError, match=r"its kind is 'none', not one of streaming, counts, stacked"):
        from_state({})
    with pytest.raises(EvaError, match="its kind is 'nonsense'"):
        from_state({"kind": name_tensor("nonsense")})
    counts = KINDS["counts"](2, n_features=9).partial_fit(torch.arange(9) // 2)
    with pytest.raises(EvaError, match="not a state of StreamingPCA: its kind is 'counts'"):
        StreamingPCA(2).load_state_dict(counts.state_dict() | {"backend": name_tensor("exact")})
