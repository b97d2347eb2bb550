"""How rows become text: which field is learned, what stands around a prompt, and what is not a string."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from evatune.errors import EvaError
from evatune.models import load_tokenizer
from evatune.tasks.generation.formats import FORMATS, find_format, in_chat
from evatune.tasks.generation.settings import GenerationData


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def converted(row, tokenizer=None, *, name="auto"):
    return find_format(name, row, source="data", tokenizer=tokenizer)(row)


def test_a_completion_among_choices_is_a_question():
    row = {"prompt": "Review: dull\nSentiment:", "completion": " negative", "choices": [" negative", " positive"]}
    example = FORMATS["completion"].convert(row)
    assert (example.choices, example.answer) == ((" negative", " positive"), 0)
    with pytest.raises(EvaError, match="is ' negative', but must be one of the choices, ' good', ' bad'"):
        FORMATS["completion"].convert(row | {"choices": [" good", " bad"]})
    assert FORMATS["completion"].convert(row | {"choices": None}).answer is None


def test_nothing_stands_between_prompt_and_completion():
    example = converted({"prompt": "a", "completion": "b"})
    assert (example.text, example.template) == ("ab", "{prompt}")


@pytest.mark.parametrize("extra", ["", None, "  "])
def test_alpaca_without_input(extra):
    example = converted({"instruction": "Add.", "input": extra, "output": "3"})
    assert example.prompt.endswith("### Instruction:\nAdd.\n\n### Response:\n")
    assert "### Input" not in example.prompt
    assert example.completion == "3"
    assert example.template.replace("{prompt}", "Add.") == example.prompt


def test_alpaca_with_input():
    example = converted({"instruction": "Add.", "input": "1 {prompt} 2", "output": "3"})
    assert example.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 {prompt} 2\n\n### Response:\n")
    assert converted({"instruction": "Add.", "input": "1 2", "output": " "}) is None


@pytest.mark.parametrize(("extra", "asked"), [("", "Add."), ("1 2", "Add.\n\n1 2")])
def test_alpaca_in_a_chat_has_no_template_of_its_own(extra, asked, tokenizer):
    example = in_chat(converted({"instruction": "Add.", "input": extra, "output": "3"}), tokenizer)
    assert example.text == f"<user> {asked}</s><assistant> 3</s>"


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
TEXT = "<user> hi</s><assistant> hello</s>"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "hello"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"conversations": [USER, ANSWER]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                ANSWER,
            ]
        },
    ],
)
def test_conversations_in_every_spelling(row, tokenizer):
    example = converted(row, tokenizer)
    assert example.text == TEXT
    assert example.completion == "hello</s>"
    assert example.template is None
    assert not example.special_tokens


def test_only_the_turns_of_the_completion_are_learned(tokenizer):
    row = {"prompt": [USER, ANSWER, USER], "completion": [{"role": "assistant", "content": "bye"}]}
    example = converted(row, tokenizer)
    assert example.pieces == ((TEXT + "<user> hi</s><assistant> ", False), ("bye</s>", True))


def test_system_turns_and_columns(tokenizer):
    told = {"role": "system", "content": "be kind"}
    assert converted({"messages": [told, USER, ANSWER]}, tokenizer).prompt.startswith("<system> be kind</s><user> hi")
    row = {"system": "be kind", "conversations": [USER, ANSWER]}
    assert converted(row, tokenizer).prompt.startswith("<system> be kind</s><user> hi")


def test_tools_reach_the_template(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% if tools %}[{{ tools[0]['function']['name'] }}]{% endif %}"
        "{% for m in messages %}<{{ m['role'] }}>{% if m['tool_calls'] %}call {{ m['tool_calls'][0]['name'] }}"
        "{% else %}{{ m['content'] }}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    row = {
        "messages": [USER, call, {"role": "tool", "content": "3"}, ANSWER],
        "tools": '[{"type": "function", "function": {"name": "add", "parameters": {}}}]',
    }
    example = converted(row, tokenizer)
    assert example.text == "[add]<user>hi</s><assistant>call add</s><tool>3</s><assistant>hello</s>"
    assert [text for text, learned in example.pieces if learned] == ["call add</s>", "hello</s>"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "usr", "content": "hi"}]}, r"turn 1 is of role 'usr' \(did you mean 'user'"),
        ({"messages": [USER, "hello"]}, "turn 2 must have a role and a content, not 'hello'"),
        ({"messages": "hello"}, "a conversation must be a list of turns, not 'hello'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "turn 1 has a part of type 'image'"),
        (
            {"messages": [{"role": "user", "content": {"a": 1}}]},
            "the content of turn 1 is {'a': 1}, which is not a string",
        ),
        ({"prompt": {"text": "hi"}, "completion": "b"}, "field 'prompt' holds a dict, which is not a string"),
        ({"text": ["a", "b"]}, "field 'text' holds a list, which is not a string"),
        ({"txt": "a"}, r"fit no known format \(.*say with columns which field is which"),
    ],
)
def test_what_is_no_text_is_never_written_as_one(row, message, tokenizer):
    with pytest.raises(EvaError, match=message):
        converted(row, tokenizer)


def test_a_template_that_refuses_says_so(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(EvaError, match="cannot write this conversation: roles must alternate"):
        converted({"messages": [USER, ANSWER]}, tokenizer)


def test_an_unknown_format_has_near_names():
    with pytest.raises(EvaError, match=r"no data format 'alpacca' \(did you mean 'alpaca'"):
        converted({"text": "a"}, name="alpacca")


def test_the_setting_has_every_format():
    assert get_args(get_type_hints(GenerationData)["format"]) == ("auto", *FORMATS)
