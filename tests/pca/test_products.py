"""The products that every batch costs."""

from __future__ import annotations

import pytest
import torch

from evatune.pca.products import accumulate_gram, accumulate_product, energies_along, gram_norm, symmetric


@pytest.mark.parametrize("n_features", [1, 2, 63, 64, 65, 200, 577])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strips_make_up_the_gram_matrix(n_features, dtype):
    generator = torch.Generator().manual_seed(n_features)
    batches = [torch.randn(50, n_features, generator=generator).to(dtype) for _ in range(2)]
    total = torch.zeros(n_features, n_features, dtype=torch.promote_types(dtype, torch.float32))
    for rows in batches:
        accumulate_gram(total, rows)
    whole = sum(rows.double().T @ rows.double() for rows in batches)
    error = (symmetric(total).double() - whole).abs().max() / whole.abs().max()
    assert error < {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]


def test_what_is_left_out_is_filled_in_and_counted():
    rows = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)).double()
    total = torch.zeros(200, 200).double()
    accumulate_gram(total, rows)
    assert not total[0, 199], "or nothing was left out"
    whole = symmetric(total)
    torch.testing.assert_close(whole, rows.T @ rows, rtol=1e-12, atol=1e-12)
    assert not total[0, 199], "and the argument stays as it is"
    torch.testing.assert_close(gram_norm(total), torch.linalg.matrix_norm(rows.T @ rows), rtol=1e-12, atol=0)


def test_energies_along_directions_count_what_is_left_out():
    generator = torch.Generator().manual_seed(0)
    rows, directions = (torch.randn(n, 200, generator=generator).double() for n in (50, 7))
    total = torch.zeros(200, 200).double()
    accumulate_gram(total, rows)
    torch.testing.assert_close(energies_along(total, directions), (rows @ directions.T).square().sum(dim=0))


def test_a_half_precision_product_is_added_in_full_precision():
    total = torch.full((1, 1), 2.0**12)
    accumulate_product(total, torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(3, 1, dtype=torch.bfloat16))
    assert total.item() == 2**12 + 3  # bfloat16 has no number between 4096 and 4128
