"""Matrices that wait in main memory while they are not used."""

from __future__ import annotations

import copy

import pytest
import torch
from tests import fake_device

from evatune.pca import StreamingPCA, make_room, many, settle_all, widths
from evatune.pca.parking import Parkable

pytestmark = pytest.mark.on_cpu("it brings a device of its own")


@pytest.fixture
def device():
    with fake_device.fake_device() as found:
        yield found


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def test_a_parked_matrix_is_on_its_device_while_it_is_used(device):
    expected = numbers(5, 3)
    matrix = Parkable(expected.to(device), changes=True)
    assert matrix.device_bytes == matrix.nbytes == 60
    matrix.leave()
    assert matrix.device_bytes == 60, "it is not parked yet"
    matrix.park()
    assert matrix.is_parked and matrix.device_bytes == 0 and matrix.shape == (5, 3)
    for _ in range(2):
        here = matrix.get()
        assert here.device.type == device.type and matrix.device_bytes == 60
        torch.testing.assert_close(here.cpu(), expected, rtol=0, atol=0)
        here += 1
        expected = expected + 1
        matrix.put(here)
        matrix.leave()
        assert matrix.device_bytes == 0
    matrix.put(numbers(5, 4).to(device))  # it has got wider
    matrix.leave()
    torch.testing.assert_close(matrix.get().cpu(), numbers(5, 4), rtol=0, atol=0)


def test_a_copy_of_a_parked_matrix_is_its_own(device):
    matrix = Parkable(numbers(5, 3).to(device), changes=True)
    matrix.park()
    copied = copy.deepcopy(matrix)
    assert matrix.device_bytes == copied.device_bytes == 0 and copied.is_parked
    copied.put(copied.get().zero_())
    again = copy.deepcopy(matrix)
    matrix.get().zero_()
    assert torch.equal(again.get().cpu(), numbers(5, 3)) and not copied.get().any()


def test_a_copy_of_a_matrix_on_its_device_is_its_own(device):
    matrix = Parkable(numbers(5, 3).to(device), changes=True)
    copy.deepcopy(matrix).get().zero_()
    assert torch.equal(matrix.get().cpu(), numbers(5, 3))


def test_nothing_is_parked_where_the_device_computes_in_main_memory():
    matrix = Parkable(numbers(5, 3), changes=True)
    before = matrix.get()
    matrix.park()
    assert matrix.device_bytes == 0 and not matrix.is_parked and matrix.get() is before


@pytest.fixture
def room(device, monkeypatch):
    """Let sketches of 1,024 features get wider, as those of wider rows do, and return what sets their room."""
    monkeypatch.setattr(widths, "EXACT_UP_TO", 512)
    return lambda n_bytes: monkeypatch.setattr(many, "STATES_BYTES", n_bytes)


def fitted(device, n):
    """Return sketches of inputs that have got wider."""
    pcas = [StreamingPCA(4, backend="sketch", tolerance=1e-9) for _ in range(n)]
    for seed in range(3):
        for number, pca in enumerate(pcas):
            rows = numbers(400, 1024, seed=10 * number + seed) / torch.arange(1, 1025, device="cpu").sqrt()
            pca.add(rows.to(device))
        settle_all(pcas)
    return pcas


def held(pcas):
    return sum(matrix.device_bytes for pca in pcas for matrix in pca.parkable())


def test_wide_sketches_make_room(device, room):
    pcas = fitted(device, 2)
    begun = sum(pca.cost(n_features=1024).initial_bytes for pca in pcas)
    wide = held(pcas)
    assert wide > 2 * begun
    make_room(pcas)
    assert held(pcas) == wide, "where there is enough room, nothing is moved"
    room(0)
    others = fitted(device, 2)
    for seed in (5, 6):
        make_room(pcas)
        assert begun / 3 < held(pcas) <= begun
        for pca, other in zip(pcas, others, strict=True):
            rows = numbers(pca.n_samples_seen_, 1024, seed=seed).to(device)
            pca.add(rows)
            other.add(rows)
        assert held(pcas) <= begun, "those to which rows were added have left again"
        settle_all(pcas)
        settle_all(others)
        assert held(pcas) > begun, "a factorization needs them"
        for pca, other in zip(pcas, others, strict=True):
            assert torch.equal(pca.components_.cpu(), other.components_.cpu())


def test_test_matrices_go_first(device, room):
    pcas = fitted(device, 2)
    begun = sum(pca.cost(n_features=1024).initial_bytes for pca in pcas)
    room(max(begun, int(0.7 * held(pcas))))
    make_room(pcas)
    assert [[matrix.is_parked for matrix in pca.parkable()] for pca in pcas] == 2 * [[True, False]]
