"""The sentence that a page begins with."""

from __future__ import annotations

import json

import pytest

from evatune.exhibits.short import headline
from evatune.exhibits.view import View


@pytest.fixture
def said(results):
    """Return a function that gives the sentences on the first task of results, whose records a function may change."""

    def say(change=lambda record: record, *, against: str | None = None, **options) -> tuple[str, str]:
        folder = results({"sst2": "accuracy"}, **options)
        path = folder / "records.jsonl"
        records = [change(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        path.write_text("".join(json.dumps(record) + "\n" for record in records if record))
        return headline(View(folders=(str(folder),), against=against))

    return say


def only(number: int):
    """Return a change of records by which all methods have the outcomes of LoRA but for so many examples."""

    def change(record):
        if record["state"] == "done":
            more = number + record["seed"] if record["method"] == "eva ρ=1" else 0
            right = [1.0] * (35 + more) + [0.0] * (15 - more)
            after = record["after"] | {"outcomes": {"right": right}, "metrics": {"accuracy": sum(right) / 50}}
            record = record | {"after": after}
        return record

    return change


def test_a_method_that_is_better_beyond_chance_is_called_so(said):
    title, numbers = said()
    assert title == "sst2: eva ρ=1 is best of 4, and better than lora beyond chance"
    assert (
        "`eva ρ=1` has 0.8200 ± 0.0200 accuracy, `lora` 0.7200 ± 0.0200: better by +0.1000, 95% interval +0.0"
        in numbers
    )
    assert numbers.endswith("better beyond chance are `eva ρ=1`, `eva ρ=2`; worse beyond chance is `pissa`.")


def test_a_difference_of_chance_is_called_so(said):
    title, numbers = said(only(0))
    assert title == "sst2: eva ρ=1 is best of 4, but cannot be told apart from lora"
    assert numbers.endswith("3 methods were compared with lora: none differs beyond chance.")


def test_the_reference_may_be_best(said):
    title, numbers = said(against="eva")
    assert title == "sst2: eva ρ=1 is best of 4"
    assert numbers.endswith("3 methods were compared with eva ρ=1: worse beyond chance are `lora`, `pissa`.")


def test_nothing_is_claimed_of_a_single_seed(said):
    title, numbers = said(seeds=1)
    assert title == "sst2: eva ρ=1 is best of 4, of one seed, which is too few to tell"
    assert numbers.endswith("over examples alone. Another seed may say the opposite.") and "p =" not in numbers


def test_what_cannot_be_compared_is_told(said):
    def without_outcomes(record):
        return record | {"after": record["after"] and record["after"] | {"outcomes": {}}}

    title, numbers = said(without_outcomes, name="unpaired")
    assert title == "sst2: eva ρ=1 is best of 4" and numbers.endswith("Their examples cannot be paired.")
    title, numbers = said(against="none", name="alone")
    assert title == "sst2: eva ρ=1 is best of 4" and numbers.endswith("There is no method to compare with.")
    title, numbers = said(lambda record: record if record["method"] != "lora" else None, name="missing")
    assert numbers.endswith("; lora has no score to compare with.")


def test_a_method_with_a_part_of_its_seeds_is_not_called_best(said):
    title, _ = said(lambda record: None if record["method"] == "eva ρ=1" and record["seed"] else record)
    assert title.startswith("sst2: eva ρ=2 is best of 3")
