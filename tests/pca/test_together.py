"""Algorithms side by side: the same results as alone, and one question to the host for all."""

from __future__ import annotations

from collections import defaultdict
from threading import get_ident

import pytest
import torch
from tests import fake_device

from evatune import EvaError, StreamingPCA
from evatune.pca import learn_all, settle_all, snapshot_all, together
from evatune.pca.one_hot import OneHotPCA
from evatune.pca.stacked import StackedPCA
from evatune.pca.together import Eigh, Host, InverseRoot, Orthonormal, Work, alone


def spd(n, *, seed):
    factor = torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).double()
    return factor @ factor.T + n * torch.eye(n).double()


def rows(n=60, d=300, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.arange(1, d + 1) ** -0.5 + seed


@pytest.fixture(params=[1, 3])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def answered(monkeypatch):
    """How many requests of each kind were answered at once, in order."""
    groups: list[tuple[str, int]] = []
    for kind in (Host, Eigh, Orthonormal, InverseRoot):
        ordinary = kind.answers.__func__

        def answers(cls, requests, ordinary=ordinary):
            groups.append((cls.__name__, len(requests)))
            return ordinary(cls, requests)

        monkeypatch.setattr(kind, "answers", classmethod(answers))
    return groups


def test_factors_of_a_stack_are_those_of_each_matrix(n_threads):
    matrices = [spd(5, seed=seed) for seed in range(4)] + [spd(3, seed=9)]

    def one(matrix):
        values, vectors = yield Eigh(matrix)
        basis, triangle = yield Orthonormal(matrix)
        root, pivot = yield InverseRoot(matrix)
        _, no_pivot = yield InverseRoot(-matrix)
        (is_definite,) = yield Host(pivot > 0)
        return values, vectors, basis, triangle, root, float(no_pivot), is_definite

    for matrix, found in zip(matrices, together.together(Work(one(matrix)) for matrix in matrices), strict=True):
        values, vectors, basis, triangle, root, no_pivot, is_definite = found
        torch.testing.assert_close(vectors * values @ vectors.T, matrix)
        torch.testing.assert_close(basis @ triangle, matrix)
        torch.testing.assert_close(root @ root.T, torch.linalg.inv(matrix))
        assert torch.equal(root, root.triu()) and (is_definite, no_pivot) == (1.0, 0.0)
        assert all(torch.equal(*pair) for pair in zip(found[:5], alone(one(matrix))[:5], strict=True))


def test_a_function_of_many_is_called_once_for_a_stack_of_each_shape_on_an_accelerator():
    calls = []

    def halves(matrix, vector, *, weight):
        calls.append(tuple(matrix.shape))
        return matrix / 2, (matrix @ vector[..., None])[..., 0] * weight

    def one(matrix, vector, weight):
        half, product = yield together.batched(halves, matrix, vector, weight=weight)
        (least,) = yield Host(product.min())
        return half, product, least

    given = [(spd(n, seed=seed), torch.arange(n).double(), weight) for seed, (n, weight) in enumerate(FOUR)]
    expected = [alone(one(*arguments)) for arguments in given]
    assert calls == [(n, n) for n, _ in FOUR], "a CPU calls it for each"
    calls.clear()
    with fake_device.fake_device() as device:
        there = [(matrix.to(device), vector.to(device), weight) for matrix, vector, weight in given]
        found = together.together([Work(one(*arguments), device=device) for arguments in there])
        assert sorted(calls) == [(2, 3, 3), (3, 3), (4, 4)]
        for (half, product, least), (expected_half, expected_product, expected_least) in zip(
            found, expected, strict=True
        ):
            torch.testing.assert_close(half.cpu(), expected_half)
            torch.testing.assert_close(product.cpu(), expected_product)
            assert least == pytest.approx(expected_least)


FOUR = ((3, 1.0), (3, 2.0), (4, 1.0), (3, 1.0))
"""Sizes and settings: two of them can be answered together."""


@pytest.mark.parametrize("is_late", [True, False])
def test_numbers_are_read_when_as_many_as_possible_want_some(answered, is_late):
    def one(matrix, n_before):
        for _ in range(n_before):
            matrix, _ = yield InverseRoot(matrix @ matrix.T)
        (trace,) = yield Host(matrix.trace())
        return trace

    together.together(Work(one(spd(3, seed=seed), seed if is_late else 1)) for seed in range(3))
    assert [kind for kind, _ in answered].count("Host") == 1 and answered[-1] == ("Host", 3)


def test_where_matrices_are_factorized(monkeypatch):
    """MPS factorizes nothing; torch before 2.12 decomposes stacks of wider matrices one by one on CUDA."""
    for one_by_one, places in ((True, [False, True, True, False]), (False, [False] * 4)):
        monkeypatch.setattr(together, "ONE_BY_ONE", one_by_one)
        assert [Eigh.is_for_host("cuda", size) for size in (32, 33, 512, 513)] == places
    assert all(kind.is_for_host("mps", 8) for kind in (Eigh, Orthonormal, InverseRoot))
    assert not any(kind.is_for_host("cuda", 128) for kind in (Orthonormal, InverseRoot))
    assert not any(kind.is_for_host("cpu", 128) for kind in (Eigh, Orthonormal, InverseRoot))


@pytest.mark.parametrize("kind", [Eigh, Orthonormal, InverseRoot])
def test_the_host_gives_the_same_factors_to_the_device(monkeypatch, n_threads, kind):
    matrices = [spd(5, seed=seed) for seed in range(4)]
    expected = [kind.factorized(matrix) for matrix in matrices]
    monkeypatch.setattr(kind, "is_for_host", lambda device_type, size: True)
    answers = list(kind.answers([kind(matrix) for matrix in matrices]))
    assert torch.get_num_threads() == n_threads and len(answers) == 4
    for factors, answer in zip(expected, answers, strict=True):
        assert [factor.device for factor in answer] == [matrices[0].device] * 2
        assert all(torch.equal(*pair) for pair in zip(factors, answer, strict=True))


def test_each_gets_its_own_answer_whatever_its_pace():
    def counted(n):
        seen = []
        for number in range(n):
            seen += yield Host(torch.arange(number + 1))
        return seen

    results = together.together(Work(counted(n)) for n in (3, 0, 1))
    assert results == [[0, 0, 1, 0, 1, 2], [], [0]]


def test_what_one_raises_ends_the_others(n_threads):
    ended = []

    def failing():
        yield Host(torch.zeros(1))
        raise EvaError("boom")

    def waiting():
        try:
            while True:
                yield Host(torch.zeros(1))
        finally:
            ended.append(True)

    with pytest.raises(EvaError, match="boom"):
        together.together([Work(waiting()), Work(failing())])
    assert ended == [True] and torch.get_num_threads() == n_threads


def test_no_thread_runs_more_at_a_time_than_memory_is_for(monkeypatch, n_threads):
    monkeypatch.setattr(together, "PROCESSOR_BYTES", 100)
    running, most = defaultdict(set), []

    def tracked(number):
        mine = running[get_ident()]
        mine.add(number)
        yield Host(torch.zeros(1))
        most.append(len(mine))
        mine.discard(number)
        return number

    assert together.together(Work(tracked(n), n_bytes=40) for n in range(7)) == list(range(7))
    assert max(most) == 2 and len(running) <= n_threads


def everything(pca):
    return [pca.components_, pca.singular_values_, pca.snapshot().components, pca.snapshot().singular_values]


@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
def test_many_together_are_what_each_is_alone(backend, n_threads):
    def new():
        return [StreamingPCA(4, backend=backend, product_dtype=torch.float32) for _ in range(5)]

    apart, side_by_side = new(), new()
    for number in range(4):
        for seed, (one, other) in enumerate(zip(apart, side_by_side, strict=True)):
            batch = rows(40 + seed, seed=seed + 10 * number)
            one.partial_fit(batch).snapshot()
            other.add(batch)
        settle_all(side_by_side)
        snapshot_all(side_by_side)
    for pca in apart:
        pca.refresh()
    learn_all(side_by_side)
    for one, other in zip(apart, side_by_side, strict=True):
        assert one.backend_ == other.backend_
        for mine, theirs in zip(everything(one), everything(other), strict=True):
            torch.testing.assert_close(theirs, mine, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["exact", "sketch"])
def test_the_host_is_asked_as_often_for_many_inputs_as_for_one(monkeypatch, answered, backend):
    monkeypatch.setattr(together, "PROCESSOR_BYTES", together.ACCELERATOR_BYTES)
    counts = {}
    for n_inputs in (1, 12):
        pcas = [StreamingPCA(4, backend=backend, tolerance=None) for _ in range(n_inputs)]
        for number in range(4):
            for seed, pca in enumerate(pcas):
                pca.add(rows(seed=seed + 100 * number))
            answered.clear()
            settle_all(pcas)
            snapshot_all(pcas)
        counts[n_inputs] = [kind for kind, _ in answered]
        assert {size for _, size in answered} == {n_inputs}
    assert counts[1] == counts[12] and len(counts[1]) <= 12


def test_parts_of_a_stack_and_counts_are_done_together_with_others(answered):
    stack = StackedPCA(3, widths=[300] * 4, new_pca=lambda k: StreamingPCA(k, backend="exact"))
    stack.add([rows(seed=seed) for seed in range(3)] + [rows(0)])
    counts = OneHotPCA(3, n_features=9).partial_fit(torch.arange(9) // 2)
    other = StreamingPCA(3, backend="exact").add(rows(seed=7))
    pcas = [stack, counts, other, StreamingPCA(3)]
    settle_all(pcas)
    snapshot_all(pcas)
    assert ("Orthonormal", 4) in answered
    answered.clear()
    assert stack.snapshot().components.shape == (3, 1200) and counts.snapshot().components.shape == (3, 9)
    for pca in (stack, counts, other):
        assert pca.snapshot().total_variance == pytest.approx(pca.total_variance_)
    assert not answered, "they are known by now"


def test_what_was_put_off_is_as_good_as_what_was_not():
    """Rows of one input may come in pieces; the sketch is refreshed once for all of a batch."""
    put_off, at_once = (StreamingPCA(4, backend="sketch") for _ in range(2))
    for number in range(6):
        batch = rows(90, seed=number)
        for piece in batch.split(30):
            put_off.add(piece)
        put_off.settle()
        at_once.partial_fit(batch)
    cosines = (put_off.components_ * at_once.components_).sum(dim=1)
    assert (cosines > 0.999).all()
    assert not put_off.works(together.Task.SETTLE)


def test_autocast_around_it_rounds_nothing():
    plain = StreamingPCA(4, backend="exact").add(rows())
    inside = StreamingPCA(4, backend="exact").add(rows())
    learn_all([plain])
    with torch.autocast("cpu", torch.bfloat16):
        learn_all([inside])
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(plain.components_, inside.components_)
