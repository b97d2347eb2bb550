"""The eight commonsense prompts, built from rows in their original form."""

from __future__ import annotations

import json

import pytest

from evatune.errors import EvaError
from evatune.tasks.generation.formats import find_format

ROWS = {
    "boolq": {
        "passage": "Drinking in public -- Drinking in public is most commonly accepted.",
        "question": "can you drink on the street in china",
        "answer": True,
    },
    "piqa": {"goal": "When boiling butter, you can", "sol1": "Pour it onto a plate", "sol2": "Pour it", "label": 1},
    "siqa": {
        "context": "Carson relocated somewhere new.",
        "question": "How would you describe Carson?",
        "answerA": "mobile",
        "answerB": "anxious",
        "answerC": "lonely",
        "label": "1",
    },
    "hellaswag": {
        "activity_label": "Playing drums",
        "ctx_a": "People are standing behind large drums.",
        "ctx_b": "a man",
        "endings": ["is playing a bag pipe.", "begins playing the drums."],
        "label": "1",
    },
    "winogrande": {"sentence": "Ian ate because _ ate.", "option1": "Ian", "option2": "Dennis", "answer": "2"},
    "arc": {
        "question": "Which factor causes a fever?",
        "choices": {"text": ["a muscle", "bacteria"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "openbookqa": {
        "question_stem": "The sun is responsible for",
        "choices": [{"text": "puppies", "label": "1"}, {"text": "plants", "label": "2"}],
        "answerKey": "2",
    },
}
TEXTS = {
    "boolq": "Passage: Drinking in public -- Drinking in public is most commonly accepted.\n\nAfter reading this "
    "passage, please answer the following question with true or false, question: can you drink on the street in china"
    "\n\nAnswer format: true/false\nthe correct answer is true",
    "piqa": "Please choose the correct solution to the question: When boiling butter, you can\n\nSolution1: Pour it "
    "onto a plate\n\nSolution2: Pour it\n\nAnswer format: solution1/solution2\nthe correct answer is solution2",
    "siqa": "Please choose the correct answer to the question: Carson relocated somewhere new. How would you describe "
    "Carson?\n\nAnswer1: mobile Answer2: anxious Answer3: lonely\n\nAnswer format: answer1/answer2/answer3\n"
    "the correct answer is answer1",
    "hellaswag": "Please choose the correct ending to complete the given sentence: Playing drums: People are standing "
    "behind large drums. A man\n\nEnding1: is playing a bag pipe. Ending2: begins playing the drums.\n\n"
    "Answer format: ending1/ending2\nthe correct answer is ending2",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence: Ian ate "
    "because _ ate.\n\nOption1: Ian Option2: Dennis\n\nAnswer format: option1/option2\nthe correct answer is option2",
    "arc": "Please choose the correct answer to the question: Which factor causes a fever?\n\nAnswer1: a muscle "
    "Answer2: bacteria\n\nAnswer format: answer1/answer2\nthe correct answer is answer2",
    "openbookqa": "Please choose the correct answer to the question: The sun is responsible for\n\nAnswer1: puppies "
    "Answer2: plants\n\nAnswer format: answer1/answer2\nthe correct answer is answer2",
}


def converted(row: dict, *, name: str = "auto"):
    return find_format(name, row, source="data")(row)


@pytest.mark.parametrize("name", ROWS)
def test_the_prompt_of_each_task(name):
    example = converted(ROWS[name])  # the fields alone tell which task it is
    assert example.text == TEXTS[name]
    assert example == converted(ROWS[name], name=name)
    assert example.choices[example.answer] == example.completion
    assert len(set(example.choices)) == (3 if name == "siqa" else 2)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("piqa", {"label": -1}),
        ("hellaswag", {"label": ""}),
        ("winogrande", {"answer": None}),
        ("arc", {"answerKey": ""}),
        ("boolq", {"question": " "}),
    ],
)
def test_rows_without_a_question_or_a_published_answer_are_left_out(name, change):
    assert converted(ROWS[name] | change) is None


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", {"label": 2}, "field 'label' is '2', but must be one of 0, 1"),
        ("siqa", {"label": "0"}, "field 'label' is '0', but must be one of 1, 2, 3"),
        ("hellaswag", {"label": "7"}, "must be one of 0, 1"),
        ("winogrande", {"answer": "3"}, "field 'answer' is '3', but must be one of 1, 2"),
        ("arc", {"answerKey": "E"}, "field 'answerKey' is 'E', but must be one of A, B"),
        ("boolq", {"answer": "perhaps"}, "field 'answer' is 'perhaps', but must be one of true, false"),
        ("hellaswag", {"endings": "both"}, "field 'endings' must hold a list of answers"),
        ("arc", {"choices": ["a", "b"]}, "field 'choices' must hold the lists 'text' and 'label'"),
        ("arc", {"choices": {"text": ["a", "b"]}}, "field 'choices' must hold the lists 'text' and 'label'"),
    ],
)
def test_labels_out_of_range_are_errors(name, change, message):
    with pytest.raises(EvaError, match=message):
        converted(ROWS[name] | change)


@pytest.mark.parametrize(("name", "field"), [("arc", "choices"), ("hellaswag", "endings")])
def test_a_row_that_lacks_a_list_is_told(name, field):
    convert = find_format("auto", ROWS[name], source="rows")
    with pytest.raises(EvaError, match=f"field '{field}' must hold"):
        convert({key: value for key, value in ROWS[name].items() if key != field})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "maybe"}, "field 'answer' is 'maybe', but must be one of true, false"),
        ({"output": "yes"}, "field 'output' is 'yes', but must end in the answer, 'true'"),
    ],
)
def test_answers_that_a_prompt_does_not_list_are_errors(change, message):
    row = {"instruction": "Is it?\n\nAnswer format: true/false", "input": "", "output": "it is true", "answer": "true"}
    assert converted(row).choices == ("it is true", "it is false")
    with pytest.raises(EvaError, match=message):
        converted(row | change)


@pytest.mark.parametrize(
    ("original", "templated"),
    [("piqa/plain_text", "piqa"), ("social_i_qa/none", "social_i_qa"), ("winogrande/winogrande_xl", "winogrande")],
)
def test_prompts_equal_those_of_the_published_files(original, templated, original_data, real_data):
    """The files of Hu et al. (2023); in theirs of WinoGrande the answer format has no line of its own."""
    from datasets import load_from_disk

    folder = original_data / "hf_datasets" / original / "validation"
    rows = list(load_from_disk(str(folder)))
    published = json.loads(real_data(f"commonsense/{templated}/test.json").read_text())
    assert len(rows) == len(published)
    for row, other in zip(rows, published, strict=True):
        ours, theirs = converted(row), converted(other)
        assert ours.text.replace("\n\nAnswer format", " Answer format") == theirs.text.replace(
            "\n\nAnswer format", " Answer format"
        )
        assert ours.answer == theirs.answer
