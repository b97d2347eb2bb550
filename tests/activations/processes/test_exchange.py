"""What processes send each other, with threads in place of processes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from evatune.activations.processes import exchange
from evatune.activations.processes.exchange import Processes, layout_of


class Shared:
    def __init__(self, size: int) -> None:
        self.size, self.slots, self.barrier = size, [None] * size, threading.Barrier(size, timeout=20)

    def all(self, number: int, value):
        self.slots[number] = value
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone


class Threads(Processes):
    """The same exchange between threads; shapes must agree, as they must between processes."""

    def __init__(self, number: int, shared: Shared) -> None:
        self.number, self.size, self.shared = number, shared.size, shared
        self.bytes_sent, self.device, self.n_gathered = 0, torch.device("cpu"), 0

    def gather(self, tensor):
        everyone = self.shared.all(self.number, tensor.clone())
        assert len({(t.shape, t.dtype) for t in everyone}) == 1
        self.bytes_sent += tensor.numel() * tensor.element_size()
        self.n_gathered += 1
        return everyone


def in_each(size: int, action):
    shared = Shared(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda number: action(Threads(number, shared)), range(size)))


STATES = [
    {"a": {"x": torch.randn(3, 4), "n": torch.tensor(7), "flag": torch.tensor(True)}, "b": {"x": torch.randn(2, 2)}},
    {},
    {"c": {"half": torch.randn(5).bfloat16(), "none": torch.zeros(0, 3)}, "a": {"x": torch.randn(1, 4).double()}},
]


@pytest.mark.parametrize("bucket_bytes", [1, 60, 2**20])
def test_states_of_any_shapes_arrive_as_they_were(monkeypatch, bucket_bytes):
    monkeypatch.setattr(exchange, "BUCKET_BYTES", bucket_bytes)

    def act(processes):
        own = STATES[processes.number]
        layouts = processes.gather_json(layout_of(own))
        before = processes.n_gathered
        found = dict(processes.gather_states(own, layouts))
        return found, processes.n_gathered - before, processes.bytes_sent

    outcomes = in_each(3, act)
    for found, n_gathered, _ in outcomes:
        assert list(found) == ["a", "b", "c"]
        for name, states in found.items():
            sent = [own[name] for own in STATES if name in own]
            assert [list(state) for state in states] == [list(state) for state in sent]
            for state, original in zip(states, sent, strict=True):
                for entry, tensor in state.items():
                    assert tensor.dtype == original[entry].dtype and torch.equal(tensor, original[entry])
        assert n_gathered == {1: 3, 60: 2, 2**20: 1}[bucket_bytes]
    assert len({sent for *_, sent in outcomes}) == 1  # all send as much, padding included


def test_numbers_and_tables_arrive_in_the_order_of_processes():
    def act(processes):
        return processes.gather_numbers(processes.number, 5), processes.gather_json({"é": "x" * 10**processes.number})

    for numbers, tables in in_each(2, act):
        assert numbers == [[0, 5], [1, 5]] and tables == [{"é": "x"}, {"é": "x" * 10}]
