"""Work on many items, each on one thread."""

from __future__ import annotations

import threading

import pytest
import torch

from evatune.pca.threads import on_one_thread_each, one_thread


@pytest.fixture(params=[1, 2, 3])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_item_is_worked_on_once_by_one_thread_and_threads_are_as_before(n_threads):
    seen = []
    on_one_thread_each(lambda item: seen.append((item, torch.get_num_threads())), range(20))
    assert sorted(item for item, _ in seen) == list(range(20))
    assert {threads for _, threads in seen} == {1}
    assert torch.get_num_threads() == n_threads


def test_threads_to_come_have_as_many_as_before(n_threads):
    on_one_thread_each(lambda item: None, range(4))
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [n_threads]


def test_what_fails_is_raised_and_threads_are_as_before(n_threads):
    def fail(item):
        if item == 2:
            raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 2"):
        on_one_thread_each(fail, range(4))
    assert torch.get_num_threads() == n_threads


def test_one_thread_is_left_as_it_was_entered_also_after_an_error(n_threads):
    def fail():
        with one_thread():
            assert torch.get_num_threads() == 1
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert torch.get_num_threads() == n_threads
