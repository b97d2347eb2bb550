"""Prompt templates: plain text, chat, and what their file may hold."""

from __future__ import annotations

import pytest

from evatune.errors import EvaError
from evatune.models import load_tokenizer
from evatune.models.prompts import PromptTemplate


def test_text_and_chat(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    assert PromptTemplate().render("{prompt} x") == "{prompt} x"
    assert PromptTemplate(text="Q: {prompt}\nA:").render("why?") == "Q: why?\nA:"
    chat = PromptTemplate(text=None)
    assert chat.render("hi", tokenizer) == "<user> hi</s><assistant> "
    assert chat.render("hi", tokenizer, system="be kind") == "<system> be kind</s><user> hi</s><assistant> "
    with pytest.raises(EvaError, match="the tokenizer has none"):
        chat.render("hi")
    with pytest.raises(EvaError, match="a system message needs a chat template"):
        PromptTemplate().render("hi", system="be kind")


@pytest.mark.parametrize("template", [PromptTemplate(text=None), PromptTemplate(text="É: {prompt}\n")])
def test_a_folder_keeps_it(tmp_path, template):
    assert PromptTemplate.load(tmp_path) is None
    template.save(tmp_path)
    assert PromptTemplate.load(tmp_path) == template


@pytest.mark.parametrize("text", ["{", "[]", '{"template": "x"}'])
def test_a_damaged_file_is_said(tmp_path, text):
    (tmp_path / "prompt.json").write_text(text)
    with pytest.raises(EvaError, match=r"prompt\.json is not a prompt template"):
        PromptTemplate.load(tmp_path)
