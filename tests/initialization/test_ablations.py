from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evatune.errors import EvaError
from evatune.initialization import eva_minor, permuted, random_rows, rotated, shuffled


@pytest.fixture
def components() -> torch.Tensor:
    noise = torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(noise)[0].T.contiguous()


def test_minor_takes_the_last_components_the_least_first(components):
    A = eva_minor(components, 3)
    assert torch.equal(A, torch.stack([components[11], components[10], components[9]]))
    A.zero_()
    assert components[11].any()


@pytest.mark.parametrize(
    ("n_kept", "rank", "message"),
    [(6, 2, "needs all 12 components of 12 features, got the first 6"), (12, 13, "rank 13 is out of range")],
)
def test_minor_refuses_what_it_cannot_know(components, n_kept, rank, message):
    with pytest.raises(EvaError, match=message):
        eva_minor(components[:n_kept], rank)


@given(seed=st.integers(0, 2**31), rank=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_a_rotation_keeps_span_and_row_norms_and_alters_directions(seed, rank):
    A = torch.linalg.qr(torch.randn(12, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0].T[
        :rank
    ]
    R = rotated(A, seed=seed)
    torch.testing.assert_close(R.T @ R, A.T @ A)  # the same projection: the same span
    torch.testing.assert_close(R.norm(dim=1), torch.ones(rank, dtype=torch.float64))
    if rank > 1:
        assert (R - A).abs().max() > 1e-6


def test_rotations_have_no_preferred_sign(components):
    firsts = torch.stack([rotated(components[:2], seed=seed) @ components[:2].T for seed in range(200)])
    assert firsts.mean(dim=0).abs().max() < 0.2


@pytest.mark.parametrize("seed", range(5))
def test_a_permutation_keeps_the_multiset_of_rows(components, seed):
    P = permuted(components, seed=seed)
    assert not torch.equal(P, components)
    assert {tuple(row.tolist()) for row in P} == {tuple(row.tolist()) for row in components}


@pytest.mark.parametrize("seed", range(5))
def test_a_shuffle_keeps_each_column_s_entries_and_spoils_row_norms(components, seed):
    S = shuffled(components[:6], seed=seed)
    assert torch.equal(S.sort(dim=0).values, components[:6].sort(dim=0).values)
    assert (S.norm(dim=1) - 1).abs().max() > 1e-3


@pytest.mark.parametrize("scramble", [rotated, permuted, shuffled])
def test_equal_seed_equal_rows_and_the_input_is_left_alone(components, scramble):
    before = components.clone()
    assert torch.equal(scramble(components, seed=3), scramble(components, seed=3))
    assert not torch.equal(scramble(components, seed=3), scramble(components, seed=4))
    assert torch.equal(components, before)
    assert scramble(components.float(), seed=0).dtype == torch.float32


def test_random_rows_are_distributed_as_peft_draws_them():
    A = random_rows(200, 64)
    linear = torch.nn.Linear(64, 200, bias=False)
    torch.nn.init.kaiming_uniform_(linear.weight, a=5**0.5)
    assert A.abs().max() <= 1 / 8
    assert A.std() == pytest.approx(float(linear.weight.std()), rel=0.05)
    assert A.mean() == pytest.approx(0, abs=3e-3)
    assert torch.equal(A, random_rows(200, 64))
