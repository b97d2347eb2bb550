"""The small linear algebra on subspaces, by property."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evatune.pca.subspace import (
    complete_basis,
    component_cosines,
    eigenpairs_of_factor,
    fix_signs,
    solver_copy,
)

PLENTY = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def matrix(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal_rows(seed, k, d):
    return torch.linalg.qr(matrix(seed, d, k)).Q.T


@PLENTY
@given(seed=seeds)
def test_fixed_signs_do_not_depend_on_the_signs_given(seed):
    components = orthonormal_rows(seed, 5, 20)
    signs = matrix(seed + 1, 5, 1).sign()
    fixed = fix_signs(components)
    assert torch.equal(fix_signs(signs * components), fixed)
    assert torch.equal(fix_signs(fixed), fixed)
    assert torch.equal(fixed.abs(), components.abs())
    assert (fixed.gather(1, fixed.abs().argmax(1, keepdim=True)) > 0).all()


def test_a_component_of_zeros_keeps_its_zeros():
    assert torch.equal(fix_signs(torch.zeros(2, 3)), torch.zeros(2, 3))


@PLENTY
@given(seed=seeds, present=st.integers(0, 12), extra=st.integers(0, 8))
def test_a_completed_basis_is_orthonormal_and_begins_with_the_given_one(seed, present, extra):
    basis = orthonormal_rows(seed, present, 20).T
    completed = complete_basis(basis, present + extra, seed=seed)
    assert completed.shape == (20, present + extra)
    assert torch.equal(completed[:, :present], basis)
    torch.testing.assert_close(
        completed.T @ completed, torch.eye(present + extra, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert torch.equal(complete_basis(basis, present + extra, seed=seed), completed)


def test_a_basis_is_completed_to_the_whole_space():
    completed = complete_basis(orthonormal_rows(0, 3, 4).T, 4, seed=0)
    torch.testing.assert_close(completed @ completed.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_basis_that_is_wide_enough_is_cut():
    basis = orthonormal_rows(0, 6, 10).T
    assert torch.equal(complete_basis(basis, 4, seed=0), basis[:, :4])


@PLENTY
@given(seed=seeds, columns=st.integers(1, 25))
def test_eigenpairs_of_a_factor_are_those_of_its_product(seed, columns):
    factor = matrix(seed, 15, columns)
    vectors, values = eigenpairs_of_factor(factor)
    assert len(values) == min(15, columns) and (values.diff() <= 0).all()
    torch.testing.assert_close((vectors * values) @ vectors.T, factor @ factor.T, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(values), dtype=torch.float64), rtol=0, atol=1e-6)


def test_directions_of_zero_are_left_out_of_eigenpairs():
    factor = torch.zeros(6, 4, dtype=torch.float64)
    factor[0, 0], factor[1, 1] = 3.0, 2.0
    vectors, values = eigenpairs_of_factor(factor)
    assert values.tolist() == pytest.approx([9.0, 4.0]) and vectors.shape == (6, 2)
    vectors, values = eigenpairs_of_factor(torch.zeros(6, 4, dtype=torch.float64))
    assert vectors.shape == (6, 0) and values.shape == (0,)


@PLENTY
@given(seed=seeds)
def test_cosines_ignore_signs_and_stay_below_one(seed):
    first, second = orthonormal_rows(seed, 4, 9), orthonormal_rows(seed + 1, 4, 9)
    signs = matrix(seed + 2, 4, 1).sign()
    cosines = component_cosines(first, second)
    assert cosines.shape == (4,) and (cosines >= 0).all() and (cosines <= 1 + 1e-12).all()
    torch.testing.assert_close(component_cosines(signs * first, second), cosines)
    torch.testing.assert_close(component_cosines(first, -first), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_solver_copy_is_never_the_matrix_itself(dtype):
    given = torch.ones(3, 3, dtype=dtype)
    copy = solver_copy(given)
    copy += 1
    assert copy.dtype == torch.float64 and torch.equal(given, torch.ones(3, 3, dtype=dtype))
