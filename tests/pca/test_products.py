"""The products that every batch costs."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evatune import StreamingPCA
from evatune.pca.products import (
    accumulate_gram,
    accumulate_product,
    energies_along,
    gram_norm,
    symmetric,
    unrounded,
)


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


@pytest.fixture
def high_precision():
    """As many training scripts have it: products of float32 numbers may be in TF32."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
def test_sums_and_components_keep_all_digits_where_the_caller_lets_float32_be_rounded(high_precision, backend):
    precisions = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "mv", "addmv"):
                precisions[torch.get_float32_matmul_precision()] += 1
            return func(*args, **(kwargs or {}))

    with Watch():
        pca = StreamingPCA(4, backend=backend).partial_fit(torch.randn(60, 300))
        pca.scatter_along(pca.partial_fit(torch.randn(60, 300)).snapshot().components)
        assert pca.components_.shape == (4, 300)
    assert set(precisions) == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"


def test_a_thread_that_ends_first_does_not_lower_the_precision_of_another(high_precision):
    with ThreadPoolExecutor(1) as pool:
        with unrounded(torch.device("cpu")):
            entered, may_leave, seen = Event(), Event(), []

            def other():
                with unrounded(torch.device("cpu")):
                    entered.set()
                    assert may_leave.wait(20)
                    seen.append(torch.get_float32_matmul_precision())

            running = pool.submit(other)
            assert entered.wait(20)
        may_leave.set()
        running.result()
    assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"


def test_parts_of_a_bfloat16_product_are_not_summed_in_bfloat16():
    products = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"
    assert getattr(products, name), "torch's own setting"
    with unrounded(torch.device("cpu")):
        assert not getattr(products, name)
    assert getattr(products, name)
    setattr(products, name, False)
    try:
        with unrounded(torch.device("cpu")):
            assert not getattr(products, name)
        assert not getattr(products, name), "as the caller has set it"
    finally:
        setattr(products, name, True)


def test_the_newer_name_of_that_precision_is_heeded_too():
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        with unrounded(torch.device("cpu")):
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before
