"""Batches of training examples, at random or in equal shares of each kind; and modes that are restored."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

from torch import nn

from evatune.tasks.task import batches, evaluating

KINDS = ["a"] * 40 + ["b"] * 8 + ["c"] * 12


def drawn(**options) -> list[list[int]]:
    task = SimpleNamespace(train=list(range(len(KINDS))), collate=list, kinds=lambda: KINDS)
    return list(batches(task, batch_size=6, **options))


def test_stratified_batches_have_equal_shares():
    stratified = drawn(seed=0, sampling="stratified")
    for batch in stratified[:4]:
        assert Counter(KINDS[index] for index in batch) == {"a": 2, "b": 2, "c": 2}
    assert Counter(KINDS[index] for index in stratified[4]) == {"a": 3, "c": 3}  # b has no more
    assert sorted(index for batch in stratified for index in batch) == list(range(len(KINDS)))


def test_each_kind_keeps_the_seeded_order_among_its_own():
    def of(kind, found):
        return [index for batch in found for index in batch if KINDS[index] == kind]

    for kind in "abc":
        assert of(kind, drawn(seed=3, sampling="stratified")) == of(kind, drawn(seed=3))
    assert drawn(seed=3, sampling="stratified") != drawn(seed=4, sampling="stratified")


def test_each_module_has_its_mode_again():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]
