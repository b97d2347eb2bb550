"""What processes send each other, with threads in place of processes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from evatune import EvaError
from evatune.activations.processes import exchange
from evatune.activations.processes.exchange import Ranks, layout_of


class Shared:
    def __init__(self, size: int) -> None:
        self.size, self.slots, self.barrier = size, [None] * size, threading.Barrier(size, timeout=20)

    def all(self, rank: int, value):
        self.slots[rank] = value
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone


class Threads(Ranks):
    """The same exchange between threads; shapes must agree, as they must between processes."""

    def __init__(self, rank: int, shared: Shared) -> None:
        self.rank, self.size, self.shared = rank, shared.size, shared
        self.bytes_sent, self.device, self.n_gathered = 0, torch.device("cpu"), 0

    def gather(self, tensor):
        everyone = self.shared.all(self.rank, tensor.clone())
        assert len({(t.shape, t.dtype) for t in everyone}) == 1
        self.bytes_sent += tensor.numel() * tensor.element_size()
        self.n_gathered += 1
        return everyone


def in_each(size: int, action):
    shared = Shared(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: action(Threads(rank, shared)), range(size)))


STATES = [
    {"a": {"x": torch.randn(3, 4), "n": torch.tensor(7), "flag": torch.tensor(True)}, "b": {"x": torch.randn(2, 2)}},
    {},
    {"c": {"half": torch.randn(5).bfloat16(), "none": torch.zeros(0, 3)}, "a": {"x": torch.randn(1, 4).double()}},
]


@pytest.mark.parametrize("bucket_bytes", [1, 60, 2**20])
def test_states_of_any_shapes_arrive_as_they_were(monkeypatch, bucket_bytes):
    monkeypatch.setattr(exchange, "BUCKET_BYTES", bucket_bytes)

    def act(ranks):
        own = STATES[ranks.rank]
        layouts = ranks.gather_json(layout_of(own))
        before = ranks.n_gathered
        found = dict(ranks.gather_states(own, layouts))
        return found, ranks.n_gathered - before, ranks.bytes_sent

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
    def act(ranks):
        return ranks.gather_numbers(ranks.rank, 5), ranks.gather_json({"é": "x" * 10**ranks.rank})

    for numbers, tables in in_each(2, act):
        assert numbers == [[0, 5], [1, 5]] and tables == [{"é": "x"}, {"é": "x" * 10}]


@pytest.fixture
def broadcast(monkeypatch):
    """`torch.distributed.broadcast` between two threads."""
    shared = Shared(2)

    def send(tensor, src):
        rank = int(threading.current_thread().name.rsplit("_", 1)[-1])
        tensor.copy_(shared.all(rank, tensor.clone())[src])

    monkeypatch.setattr(exchange.dist, "broadcast", send)


def lend(batch):
    shared = Shared(2)

    def act(rank):
        threading.current_thread().name = f"thread_{rank}"
        return Threads(rank, shared).lend(batch if rank == 1 else None, lender=1)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(act, range(2)))


def test_a_batch_is_lent_with_all_that_is_in_it(broadcast):
    batch = {"ids": torch.arange(6).view(2, 3), "more": [torch.ones(2) > 0, ("text", 3, None, 0.5)], "empty": {}}
    borrowed, own = lend(batch)
    assert own is batch
    assert torch.equal(borrowed["ids"], batch["ids"]) and borrowed["ids"].dtype == torch.int64
    assert torch.equal(borrowed["more"][0], batch["more"][0])
    assert borrowed["more"][1] == ("text", 3, None, 0.5) and borrowed["empty"] == {}


def test_a_batch_without_tensors_is_lent(broadcast):
    assert lend(["a", "b"])[0] == ["a", "b"]


def test_what_cannot_be_lent_is_named_in_all(broadcast):
    def act(batch):
        with pytest.raises(EvaError, match=r"repeat one of process 1, which holds a set; give every process at least"):
            batch()

    shared = Shared(2)
    with ThreadPoolExecutor(2) as pool:
        calls = [lambda rank=rank: Threads(rank, shared).lend({"x": {1, 2}}, lender=1) for rank in range(2)]
        list(pool.map(act, calls))
