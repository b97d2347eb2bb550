"""Many PCAs in groups: never the eigenpairs of all sketches at a time, and the same results."""

from __future__ import annotations

import pytest
import torch
from tests import fake_device

from evatune import StreamingPCA
from evatune.pca import groups_of, learn_all, many, settle_all
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
        assert torch.equal(one.components_.cpu(), other.components_.cpu())
        assert one.captured_error_ == other.captured_error_


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
