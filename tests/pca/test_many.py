"""Many PCAs in groups: never the eigenpairs of all sketches at a time, and the same results."""

from __future__ import annotations

import pytest
import torch
from tests import fake_device

from evatune import StreamingPCA
from evatune.pca import groups_of, learn_all, many, settle_all, snapshot_all
from evatune.pca.one_hot import OneHotPCA
from evatune.pca.stacked import StackedPCA

pytestmark = pytest.mark.on_cpu("it brings a device of its own")
N_ROWS, WIDTH = 60, 300


def filled(device="cpu", *, n=5, backend="sketch"):
    generator = torch.Generator().manual_seed(0)
    pcas = {number: StreamingPCA(4, backend=backend, tolerance=None) for number in range(n)}
    for pca in pcas.values():
        for _ in range(3):
            rows = torch.randn(N_ROWS, WIDTH, generator=generator) * torch.arange(1, WIDTH + 1) ** -0.5
            pca.add(rows.to(device))
    settle_all(pcas.values())
    return pcas


@pytest.fixture
def device():
    with fake_device.fake_device() as found:
        yield found


def places(pcas):
    return [list(range(len(pcas)))[group] for group in groups_of(pcas)]


def n_known(pcas):
    return sum(pca._state._known is not None for pca in pcas.values())


def test_groups_fill_the_bound_of_an_accelerator(device, monkeypatch):
    pcas = filled(device)
    stack = StackedPCA(3, widths=[WIDTH, WIDTH], new_pca=lambda k: StreamingPCA(k, backend="sketch"))
    stack.add([torch.randn(9, WIDTH).to(device) for _ in range(2)])
    pcas = [*pcas.values(), stack, OneHotPCA(3, n_features=9), StreamingPCA(3)]
    assert places(pcas) == [list(range(8))]
    monkeypatch.setattr(many, "ACCELERATOR_BYTES", 2 * pcas[0]._state.working_bytes)
    assert places(pcas) == [[0, 1], [2, 3], [4], [5, 6, 7]], "what has no rows and counts needs no memory"
    monkeypatch.setattr(many, "ACCELERATOR_BYTES", 0)
    assert places(pcas)[:3] == [[0], [1], [2]]
    assert places([]) == []


def test_on_the_cpu_all_are_one_group(monkeypatch):
    monkeypatch.setattr(many, "ACCELERATOR_BYTES", 0)
    assert places(list(filled().values())) == [[0, 1, 2, 3, 4]]


def test_what_is_learned_in_groups_is_what_is_learned_at_once(device, monkeypatch):
    at_once, in_groups = filled(device), filled(device)
    learn_all(at_once.values())
    assert n_known(at_once) == len(at_once)
    monkeypatch.setattr(many, "ACCELERATOR_BYTES", 0)
    learn_all(in_groups.values())
    assert n_known(in_groups) == 0
    for one, other in zip(at_once.values(), in_groups.values(), strict=True):
        # Products of a stack may round in another way.
        torch.testing.assert_close(one.components_.cpu(), other.components_.cpu(), rtol=0, atol=1e-5)
        assert one.captured_error_ == pytest.approx(other.captured_error_, rel=1e-4)


def awkward_batches():
    """Return batches for sketches that go different ways side by side."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, WIDTH + 1) ** -0.5

    def drawn(n_rows, scale=scale):
        return torch.randn(n_rows, WIDTH, generator=generator) * scale + 1.0

    massive = torch.where(torch.arange(WIDTH) == 7, 300.0, scale)
    flat = torch.ones(WIDTH)
    few = [drawn(5), drawn(4), drawn(5)]
    constant = [torch.full((40, WIDTH), 1.5) for _ in range(3)]
    return [[drawn(200, scale) for _ in range(3)] for scale in (scale, scale, massive, flat, flat)] + [few, constant]


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("tolerance", [1e-3, None])
def test_sketches_side_by_side_on_an_accelerator_are_those_of_a_cpu(device, center, tolerance):
    batches = awkward_batches()
    settings = {"backend": "sketch", "center": center, "tolerance": tolerance}
    alone = [StreamingPCA(4, **settings) for _ in batches]
    beside = [StreamingPCA(4, **settings) for _ in batches]
    for number in range(3):
        for pca, other, of_one in zip(alone, beside, batches, strict=True):
            pca.partial_fit(of_one[number])
            other.add(of_one[number].to(device))
        settle_all(beside)
        snapshot_all(beside)
        for pca, other in zip(alone, beside, strict=True):
            one, two = pca.snapshot(), other.snapshot()
            assert pca.backend_ == other.backend_
            torch.testing.assert_close(two.singular_values, one.singular_values, rtol=1e-3, atol=1e-3)
            assert two.total_variance == pytest.approx(one.total_variance, rel=1e-4, abs=1e-9)
    learn_all(beside)
    for pca, other in zip(alone, beside, strict=True):
        torch.testing.assert_close(other.singular_values_.cpu(), pca.singular_values_, rtol=1e-3, atol=1e-3)
        assert other.captured_error_ == pytest.approx(pca.captured_error_, rel=0.1, abs=1e-6)


@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
@pytest.mark.parametrize("is_refreshed", [True, False])
def test_what_was_released_is_found_again(backend, is_refreshed):
    (pca,), (released,) = (filled(n=1, backend=backend).values() for _ in range(2))
    for one in (pca, released):
        if is_refreshed:
            one.refresh()
        one.snapshot()
    released.release()
    assert (released.components_ * pca.components_).sum(dim=1).min() > 1 - 1e-6
    torch.testing.assert_close(released.singular_values_, pca.singular_values_, rtol=1e-4, atol=0)
    assert released.captured_error_ == pytest.approx(pca.captured_error_, rel=0.1, abs=1e-7, nan_ok=True)
    StreamingPCA(3).release()
