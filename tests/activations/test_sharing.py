"""Which calls are handed over, and with which input: sharing that ends, calls that are missing, tensors that change."""

from __future__ import annotations

import pytest
import torch

from evatune import EvaError
from evatune.activations.sharing import SharedInputs


class Log:
    """What was handed over, as the numbers in the tensors; what an input has seen before a split counts for both."""

    def __init__(self, refuse=()):
        self.rows = {}
        self.refuse = set(refuse)
        self.shared = SharedInputs(self.take, self.split)

    def take(self, key, number, entering):
        if key in self.refuse:
            return False
        self.rows.setdefault(key, []).append(int(entering[0]))
        return True

    def split(self, key, new):
        self.rows[new] = list(self.rows.get(key, []))

    def one_pass(self, *calls, change=None):
        """Make a pass of calls (name, number of the tensor); `change` is raised by one after its second use."""
        self.shared.begin_pass()
        tensors = {}
        for name, value in calls:
            tensor = tensors.setdefault(value, torch.tensor([float(value)]))
            self.shared.call(name, tensor, tensors=(tensor,))
            if (name, value) == change:
                tensor += 1
        return self.shared.end_pass()

    def batch(self, *calls, **options):
        self.shared.begin_batch()
        return self.one_pass(*calls, **options)

    def of(self, name):
        return self.rows[self.shared.input_of[name]]


def seen(log, names="qk"):
    return [log.of(name) for name in names]


def test_a_shared_tensor_is_handed_over_once():
    log = Log()
    assert log.batch(("q", 1), ("k", 1), ("v", 1)) and log.batch(("q", 2), ("k", 2), ("v", 2))
    assert log.shared.input_of == {"q": "q", "k": "q", "v": "q"} and log.rows == {"q": [1, 2]}


@pytest.mark.parametrize("order", ["qk", "kq"])
def test_sharing_that_ends_splits_an_input_with_what_it_has_seen(order):
    log = Log()
    log.batch(("q", 1), ("k", 1))
    log.batch(*((name, {"q": 2, "k": 3}[name]) for name in order))
    log.batch(("q", 4), ("k", 4))
    assert seen(log) == [[1, 2, 4], [1, 3, 4]] and log.shared.input_of == {"q": "q", "k": "k"}


def test_sharing_that_begins_later_is_measured_twice_and_right():
    log = Log()
    log.batch(("q", 1), ("k", 2))
    log.batch(("q", 3), ("k", 3))
    assert seen(log) == [[1, 3], [2, 3]]


@pytest.mark.parametrize("missing", ["q", "k"])
def test_a_target_that_is_left_out_of_a_pass_gets_no_row_of_it(missing):
    log = Log()
    log.batch(("q", 1), ("k", 1), ("v", 1))
    assert log.batch(*((name, 2) for name in "qkv" if name != missing))
    log.batch(("q", 3), ("k", 3), ("v", 3))
    assert seen(log, "qkv") == [[1, 3] if name == missing else [1, 2, 3] for name in "qkv"]


def test_loops_of_any_length():
    log = Log()
    log.batch(("q", 1), ("k", 1), ("q", 2), ("k", 2))
    log.batch(("q", 3), ("k", 3))
    log.batch(("q", 4), ("q", 5), ("q", 6), ("k", 4), ("k", 5), ("k", 6))
    assert log.rows == {"q": [1, 2, 3, 4, 5, 6]}


def test_one_shares_the_first_of_two_calls():
    log = Log()
    assert log.batch(("q", 1), ("k", 1), ("k", 2))
    assert seen(log) == [[1], [1, 2]]


def test_a_second_call_with_the_same_tensor_counts_again():
    log = Log()
    log.batch(("q", 1), ("q", 1), ("k", 1))
    assert seen(log) == [[1, 1], [1]]


def test_what_is_reached_later_shares_from_then_on():
    log = Log()
    log.batch(("q", 1))
    log.batch(("q", 2), ("a", 7), ("b", 7))
    log.batch(("a", 8), ("b", 8))
    assert log.rows == {"q": [1, 2], "a": [7, 8]} and log.shared.input_of["b"] == "a"


def test_what_is_reached_later_does_not_join_an_input_that_has_seen_more():
    log = Log()
    log.batch(("q", 1))
    log.batch(("q", 2), ("k", 2))
    assert seen(log) == [[1, 2], [2]]


def test_tensors_without_elements_are_no_calls():
    shared = SharedInputs(lambda *_: pytest.fail("handed over"), lambda *_: None)
    shared.begin_pass()
    for name in "ab":
        shared.call(name, None, tensors=(torch.zeros(0, 4),))
    assert shared.end_pass() and shared.input_of == {}


def test_an_input_splits_into_as_many_as_there_are_tensors():
    log = Log()
    log.batch(*((name, 1) for name in "abcde"))
    log.batch(("a", 2), ("b", 3), ("c", 2), ("d", 4), ("e", 3))
    assert log.shared.input_of == {"a": "a", "b": "b", "c": "a", "d": "d", "e": "b"}
    assert seen(log, "abcde") == [[1, 2], [1, 3], [1, 2], [1, 4], [1, 3]]


def test_a_tensor_that_changes_while_it_waits_asks_for_the_pass_again():
    log = Log()
    log.batch(("a", 0), ("q", 1), ("k", 1))
    calls = [("a", 5), ("q", 2), ("k", 2)]
    assert not log.batch(*calls, change=("q", 2))
    assert log.one_pass(*calls, change=("q", 2))
    assert seen(log, "aqk") == [[0, 5], [1, 2], [1, 3]], "no row is lost and none is counted twice"


def test_a_refused_call_and_those_behind_it_come_when_the_pass_is_made_again():
    log = Log(refuse=["a"])
    calls = [("a", 1), ("b", 2), ("a", 3)]
    assert log.batch(*calls) and log.rows == {"b": [2]}
    log.refuse = set()
    assert log.one_pass(*calls) and log.rows == {"b": [2], "a": [1, 3]}


def test_a_part_of_a_batch_can_be_for_some_inputs_alone():
    log = Log()
    log.batch(("a", 1), ("b", 1), ("c", 2))
    log.shared.begin_batch(only=["a"])
    log.one_pass(("a", 3), ("b", 4), ("c", 5))
    assert seen(log, "abc") == [[1, 3], [1, 4], [2]], "b shared with a until now"


def test_another_way_through_the_model_in_the_same_batch_is_an_error():
    log = Log(refuse=["b"])
    log.batch(("a", 1), ("a", 2), ("b", 3))
    with pytest.raises(EvaError, match="'a' is called 1 times when a batch is passed again, and was called 2 times"):
        log.one_pass(("a", 1), ("b", 3))
