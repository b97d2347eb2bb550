from __future__ import annotations

from evatune.tasks.generation.formats import FORMATS


def test_a_completion_among_choices_is_a_question():
    row = {"prompt": "Review: dull\nSentiment:", "completion": " negative", "choices": [" negative", " positive"]}
    example = FORMATS["completion"].convert(row)
    assert (example.choices, example.answer) == ((" negative", " positive"), 0)
    assert FORMATS["completion"].convert(row | {"choices": [" good", " bad"]}).choices == ()
    assert FORMATS["completion"].convert(row | {"choices": None}).answer is None
