"""Rows that break streaming PCAs elsewhere: few, none, constant, huge, infinite, of another width or kind."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from evatune import EvaError, EvaWarning, StreamingPCA

EVERY_BACKEND = pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
FALLING = 0.7 ** np.arange(130)


def assert_sound(pca: StreamingPCA) -> None:
    """Shapes right, orthonormal, finite, in order, shares within [0, 1]."""
    k, d = pca.n_components_, pca.n_features_in_
    assert pca.components_.shape == (k, d) and pca.singular_values_.shape == (k,)
    for name in ("components_", "singular_values_", "explained_variance_", "explained_variance_ratio_", "var_"):
        assert torch.isfinite(getattr(pca, name)).all(), name
    gram = pca.components_.double() @ pca.components_.double().T
    torch.testing.assert_close(gram, torch.eye(k).double(), rtol=0, atol=1e-4)
    assert (pca.singular_values_.diff() <= 0).all() and (pca.singular_values_ >= 0).all()
    assert (pca.var_ >= 0).all()
    assert 0 <= float(pca.explained_variance_ratio_.sum()) <= 1 + 1e-3


@EVERY_BACKEND
def test_the_first_batch_may_be_smaller_than_the_number_of_components(known_rows, stream, oracle, backend):
    known = known_rows(600, FALLING, mean=2.0, seed=0)
    pca = stream(known.batches(3, 50), 8, backend=backend)
    assert oracle(known.rows).captured_by(pca.components_, 4) > (0.99 if backend == "incremental" else 0.9999)
    assert_sound(pca)


@EVERY_BACKEND
def test_the_last_batch_may_be_one_row(known_rows, stream, oracle, backend):
    known = known_rows(601, FALLING, mean=2.0, seed=0)
    pca = stream(known.batches(200), 8, backend=backend)
    assert oracle(known.rows).captured_by(pca.components_, 4) > (0.99 if backend == "incremental" else 0.9999)
    assert pca.n_samples_seen_ == 601
    torch.testing.assert_close(pca.var_, known.rows.var(dim=0), rtol=1e-9, atol=0)


@EVERY_BACKEND
def test_all_batches_may_be_one_row(known_rows, stream, oracle, backend):
    known = known_rows(120, 0.5 ** np.arange(70), mean=2.0, seed=0)
    pca = stream(known.batches(1), 4, backend=backend)
    assert oracle(known.rows).captured_by(pca.components_, 2) > 0.999
    torch.testing.assert_close(pca.mean_, known.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(pca.var_, known.rows.var(dim=0), rtol=1e-9, atol=0)


@EVERY_BACKEND
def test_fewer_rows_than_components_leave_singular_values_of_zero(known_rows, stream, backend):
    known = known_rows(4, [3.0, 2.0, 1.0] + [0.0] * 97, seed=0)
    pca = stream([known.rows], 8, backend=backend)
    assert_sound(pca)
    torch.testing.assert_close(pca.explained_variance_[:3], known.variances[:3], rtol=1e-6, atol=0)
    assert (pca.singular_values_[3:] < 1e-5).all()
    assert float(pca.explained_variance_ratio_.sum()) == pytest.approx(1.0, abs=1e-6)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_row_is_its_own_mean_and_does_not_vary(stream, backend, dtype):
    row = torch.linspace(-3, 7, 100).to(dtype)[None]
    pca = stream([row], 4, backend=backend)
    assert_sound(pca)
    assert torch.equal(pca.mean_.to(dtype), row[0])
    assert not pca.var_.any() and not pca.singular_values_.any() and not pca.explained_variance_ratio_.any()


@EVERY_BACKEND
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -1e4 / 7, 12345.678])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [(50, 7, 333), (333, 50), (1, 99, 1000)])
def test_rows_that_never_vary_explain_nothing(stream, backend, value, dtype, sizes):
    """Sums round, so a constant that binary fractions cannot write seems to vary a little: that is no variance."""
    row = value * torch.linspace(0.3, 1.7, 100, dtype=torch.float64).to(dtype)
    pca = stream([row.expand(n, 100) for n in sizes], 4, backend=backend)
    assert_sound(pca)
    torch.testing.assert_close(pca.mean_, row, rtol=1e-6, atol=0)
    assert not pca.explained_variance_ratio_.any()
    assert pca.total_variance_ == 0.0


@EVERY_BACKEND
def test_constant_columns_get_no_weight(known_rows, stream, backend):
    known = known_rows(300, FALLING[:60], mean=1.0, seed=0)
    constant = torch.full((300, 40), 7.7, dtype=torch.float64)
    pca = stream(torch.cat([known.rows, constant], dim=1).split(100), 6, backend=backend)
    assert_sound(pca)
    assert float(pca.components_[:, 60:].abs().max()) < 1e-6
    assert float(pca.var_[60:].max()) < 1e-20
    torch.testing.assert_close(pca.mean_[60:], constant[0], rtol=1e-12, atol=0)


@EVERY_BACKEND
def test_rows_that_begin_constant_and_vary_later_are_learned(known_rows, stream, oracle, backend):
    known = known_rows(400, FALLING, mean=2.0, seed=0)
    rows = torch.cat([known.mean.expand(100, -1), known.rows])
    pca = stream(rows.split(50), 6, backend=backend)
    assert oracle(rows).captured_by(pca.components_, 3) > (0.99 if backend == "incremental" else 0.999)


@EVERY_BACKEND
def test_new_directions_that_appear_late_are_found(stream, oracle, backend):
    generator = torch.Generator().manual_seed(0)
    early = torch.zeros(400, 120).double()
    early[:, :5] = torch.randn(400, 5, generator=generator).double()
    late = torch.zeros(400, 120).double()
    late[:, 60:65] = 3 * torch.randn(400, 5, generator=generator).double()
    pca = stream([*early.split(100), *late.split(100)], 10, backend=backend)
    assert oracle(torch.cat([early, late])).captured_by(pca.components_, 10) > 0.999


@EVERY_BACKEND
def test_no_rows_are_no_event(known_rows, stream, backend):
    known = known_rows(300, FALLING, seed=0)
    batches = known.batches(100)
    with_empty = stream([batches[0][:0], batches[0], batches[0][:0], *batches[1:], batches[0][:0]], 4, backend=backend)
    assert torch.equal(with_empty.components_, stream(batches, 4, backend=backend).components_)
    assert with_empty.n_samples_seen_ == 300


def test_no_rows_at_all_leave_it_unfitted():
    pca = StreamingPCA(4).partial_fit(torch.zeros(0, 10))
    assert not hasattr(pca, "components_")
    with pytest.raises(EvaError, match="seen no rows yet; call partial_fit first"):
        _ = pca.components_


@pytest.mark.parametrize(
    "name",
    [
        "components_",
        "singular_values_",
        "explained_variance_",
        "explained_variance_ratio_",
        "total_variance_",
        "mean_",
        "var_",
        "n_samples_seen_",
        "n_components_",
        "n_features_in_",
        "backend_",
    ],
)
def test_learned_attributes_say_that_nothing_was_learned(name):
    with pytest.raises(AttributeError, match="seen no rows yet"):
        getattr(StreamingPCA(4), name)


def test_what_needs_rows_says_that_there_were_none():
    with pytest.raises(EvaError, match="seen no rows yet"):
        StreamingPCA(4).transform(torch.zeros(2, 3))
    with pytest.raises(EvaError, match="seen no rows yet"):
        StreamingPCA(4).state_dict()


@EVERY_BACKEND
def test_more_components_than_features_are_clipped_with_a_warning(known_rows, backend):
    known = known_rows(100, 0.7 ** np.arange(6), seed=0)
    pca = StreamingPCA(10, backend=backend)
    with pytest.warns(EvaWarning, match="n_components=10 is clipped to the 6 features"):
        pca.partial_fit(known.rows[:50])
    pca.partial_fit(known.rows[50:])  # said once
    assert pca.n_components_ == 6 and pca.n_components == 10
    assert_sound(pca)
    torch.testing.assert_close(pca.explained_variance_, known.variances, rtol=1e-6, atol=0)
    assert float(pca.explained_variance_ratio_.sum()) == pytest.approx(1.0)


@pytest.mark.on_cpu("an accelerator would have to wait; there, such rows are reported when components are read")
@EVERY_BACKEND
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_are_not_finite_are_counted_and_nothing_changes(known_rows, stream, backend, bad, dtype):
    known = known_rows(200, FALLING, seed=0)
    batches = [batch.to(dtype) for batch in known.batches(100)]
    pca = stream(batches, 4, backend=backend)
    before = {name: tensor.clone() for name, tensor in pca.state_dict().items()}
    broken = batches[0].clone()
    broken[3, 7] = broken[3, 8] = broken[40, 0] = bad
    with pytest.raises(EvaError, match="2 of 100 rows hold NaN or infinite values; nothing was added"):
        pca.partial_fit(broken)
    after = pca.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.on_cpu("an accelerator would have to wait")
@EVERY_BACKEND
def test_a_first_batch_that_is_not_finite_leaves_it_unfitted(known_rows, stream, backend):
    known = known_rows(200, FALLING, seed=0)
    pca = StreamingPCA(4, backend=backend)
    with pytest.raises(EvaError, match="1 of 1 rows"):
        pca.partial_fit(torch.full((1, 100), float("nan"), dtype=torch.float64))
    assert not hasattr(pca, "components_")
    pca.partial_fit(known.rows)
    assert torch.equal(pca.components_, stream([known.rows], 4, backend=backend).components_)


@pytest.mark.on_cpu("an accelerator would have to wait")
def test_squares_that_overflow_say_so():
    rows = torch.tensor([[1e30, 0.0], [-1e30, 1.0]])
    with pytest.raises(EvaError, match="squares of the rows overflow; pass the rows as float64"):
        StreamingPCA(1).partial_fit(rows)
    assert StreamingPCA(1).partial_fit(rows.double()).components_[0, 0] == pytest.approx(1.0)


@EVERY_BACKEND
def test_counts_do_not_overflow(stream, backend):
    """scikit-learn's counts were 32-bit on some systems, and their products became NaN after enough rows."""
    pca = stream([torch.randn(100, 8, generator=torch.Generator().manual_seed(0))], 2, backend=backend)
    state = pca.state_dict()
    huge = 2**33
    scale = huge / 100
    for name in ("sum", "squares", "second_moment", "sums", "values"):
        if name in state:
            state[name] = state[name] * scale
    if "singular_values" in state:
        state["singular_values"] = state["singular_values"] * scale**0.5
    state["n_samples_seen"] = torch.tensor(huge)
    later = StreamingPCA(2, backend=backend).load_state_dict(state)
    later.partial_fit(torch.randn(100, 8, generator=torch.Generator().manual_seed(1)))
    assert later.n_samples_seen_ == huge + 100
    assert_sound(later)
    torch.testing.assert_close(later.explained_variance_, pca.explained_variance_, rtol=0.02, atol=0)


@EVERY_BACKEND
def test_the_dtype_of_rows_may_change_between_batches(known_rows, oracle, backend):
    known = known_rows(400, FALLING, mean=1.0, seed=0)
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32]
    pca = StreamingPCA(4, backend=backend)
    for batch, dtype in zip(known.batches(100), dtypes, strict=True):
        pca.partial_fit(batch.to(dtype))
    assert oracle(known.rows).captured_by(pca.components_, 2) > 0.995
    assert_sound(pca)
    pca = StreamingPCA(4, backend=backend)
    for batch, dtype in zip(known.batches(100), reversed(dtypes[:2] * 2), strict=True):
        pca.partial_fit(batch.to(dtype))
    assert oracle(known.rows).captured_by(pca.components_, 2) > 0.995


@EVERY_BACKEND
def test_autocast_around_it_changes_nothing(known_rows, stream, backend):
    batches = [batch.float() for batch in known_rows(400, FALLING, mean=1.0, seed=0).batches(100)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = stream(batches, 4, backend=backend)
        components = inside.components_
    assert torch.equal(components, stream(batches, 4, backend=backend).components_)


@EVERY_BACKEND
def test_strided_and_grad_requiring_rows_are_taken(known_rows, stream, backend):
    known = known_rows(200, FALLING, seed=0)
    strided = torch.stack([known.rows, known.rows], dim=2)[:, :, 0]
    assert not strided.is_contiguous()
    pca = stream([strided.T.contiguous().T], 4, backend=backend)
    expected = stream([known.rows], 4, backend=backend)
    torch.testing.assert_close(pca.components_, expected.components_, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(3), "rows must be a float tensor of shape (n_rows, n_features), got (3,) of torch.float32"),
        (torch.zeros(2, 3, 4), "got (2, 3, 4) of torch.float32"),
        (torch.zeros(3, 4, dtype=torch.long), "got (3, 4) of torch.int64"),
        (np.zeros((3, 4)), "got ndarray"),
        ([[1.0]], "got list"),
        (torch.zeros(3, 0), "at least one feature, got shape (3, 0)"),
    ],
)
def test_what_is_not_a_matrix_of_floats_is_refused(rows, message):
    with pytest.raises(EvaError, match=re.escape(message)):
        StreamingPCA(2).partial_fit(rows)


def test_rows_of_another_width_are_refused():
    pca = StreamingPCA(2).partial_fit(torch.randn(5, 4))
    with pytest.raises(EvaError, match="rows have 3 features, but the rows before had 4"):
        pca.partial_fit(torch.randn(5, 3))
    assert pca.n_samples_seen_ == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_components": 0}, "n_components must be a whole number of at least 1, got 0"),
        ({"n_components": -3}, "got -3"),
        ({"n_components": 2.5}, "got 2.5"),
        ({"n_components": True}, "got True"),
        ({"n_components": "all"}, "got 'all'"),
        (
            {"n_components": 2, "backend": "exakt"},
            "backend must be one of auto, exact, sketch, incremental, got 'exakt'",
        ),
        ({"n_components": 2, "backend": "exakt"}, "did you mean 'exact'"),
        (
            {"n_components": 2, "product_dtype": "half"},
            "product_dtype must be 'auto' or one of torch.bfloat16, torch.float32, torch.float64, got 'half'",
        ),
        ({"n_components": 2, "product_dtype": torch.float16}, "torch.float64, got torch.float16"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(EvaError, match=re.escape(message)):
        StreamingPCA(**settings)
