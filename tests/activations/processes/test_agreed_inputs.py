"""Which targets share an input where processes have seen different things."""

from __future__ import annotations

import pytest

from evatune.activations.processes.lockstep import agreed_inputs


@pytest.mark.parametrize(
    ("tables", "agreed"),
    [
        ([{"q": "q", "k": "q"}] * 2, {"q": "q", "k": "q"}),
        ([{"q": "q", "k": "q"}, {"q": "q", "k": "k"}], {"q": "q", "k": "k"}),
        ([{"q": "q", "k": "q"}, {"q": "q"}], {"q": "q", "k": "k"}),
        ([{"a": "a"}, {"b": "b", "c": "b"}], {"a": "a", "b": "b", "c": "b"}),
    ],
    ids=["alike", "parted in one", "not reached in one", "reached in one"],
)
def test_targets_share_an_input_that_share_it_in_every_process(tables, agreed):
    assert agreed_inputs(tables) == agreed
