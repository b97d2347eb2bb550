"""Likelihoods of choices against a plain computation, one whole text at a time."""

from __future__ import annotations

import pytest
import torch
from tests.on_device import IN_INFERENCE_MODE

from evatune.tasks.generation import likelihood as module
from evatune.tasks.generation.encoding import encode_examples
from evatune.tasks.generation.example import Example
from evatune.tasks.generation.formats import in_chat
from evatune.tasks.generation.likelihood import score

pytestmark = pytest.mark.on_hardware(IN_INFERENCE_MODE)

CHOICES = {
    "one token differs": ("the correct answer is true", "the correct answer is false"),
    "several tokens": ("red green", "red blue one", "two"),
    "one begins with another": ("red", "red two"),
}


@torch.no_grad()
def plain(model, row, *, end: bool) -> float:
    ids, labels = (row[name] if end else row[name][:-1] for name in ("input_ids", "labels"))
    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_probs[place - 1, label].item() for place, label in enumerate(labels) if label != -100)


def questions(choices: tuple[str, ...]) -> list[Example]:
    prompts = ("green: ", "one two three, blue two: ", "?")
    return [
        Example(pieces=((prompt, False), (choices[answer], True)), choices=choices, answer=answer)
        for prompt in prompts
        for answer in range(len(choices))
    ]


def test_what_differs_in_one_token_takes_one_pass(model, tokenizer):
    passes: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, args, options: passes.append(1), with_kwargs=True)
    list(score(model, questions(CHOICES["one token differs"])[:2], tokenizer))
    hook.remove()
    assert len(passes) == 1


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 10_000])
@pytest.mark.parametrize("name", CHOICES)
def test_choices_and_completions(model, tokenizer, name, batch_tokens, cached, monkeypatch):
    if not cached:
        monkeypatch.setattr(module, "shares_prompts", lambda model: False)
    examples = questions(CHOICES[name])
    found = dict(pair for batch in score(model, examples, tokenizer, batch_tokens=batch_tokens) for pair in batch)
    assert sorted(found) == list(range(len(examples)))
    for index, example in enumerate(examples):
        variants = [Example(pieces=(*example.pieces[:-1], (choice, True))) for choice in example.choices]
        rows = encode_examples(variants, tokenizer).rows
        assert found[index].choices == pytest.approx([plain(model, row, end=False) for row in rows], rel=1e-4)
        right = rows[example.answer]
        assert found[index].nll == pytest.approx(-plain(model, right, end=True), rel=1e-4)
        assert found[index].tokens == sum(label != -100 for label in right["labels"])


def test_a_forward_pass_reads_a_prompt_once(model, tokenizer):
    read: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, options: read.append(options["input_ids"].numel()), with_kwargs=True
    )
    prompt = "one two three, blue two: " * 10
    choices = CHOICES["several tokens"]
    example = Example(pieces=((prompt, False), (choices[0], True)), choices=choices, answer=0)
    list(score(model, [example], tokenizer))
    hook.remove()
    assert len(read) == 2
    assert sum(read) < 1.3 * len(tokenizer(prompt)["input_ids"])


@pytest.mark.parametrize("cached", [True, False])
def test_no_pass_is_larger_than_a_batch_may_be(cached, model, tokenizer, monkeypatch):
    if not cached:
        monkeypatch.setattr(module, "shares_prompts", lambda model: False)
    read: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, options: read.append(options["input_ids"].numel()), with_kwargs=True
    )
    choices = CHOICES["several tokens"]
    pieces = (("one two three, blue two: " * 4, False), (choices[0], True))
    list(score(model, [Example(pieces=pieces, choices=choices, answer=0)] * 12, tokenizer, batch_tokens=300))
    hook.remove()
    assert 150 < max(read) <= 300


def test_too_long_prompts_lose_their_beginning_alike_for_all_choices(model, tokenizer):
    choices = CHOICES["several tokens"]
    short, long = (
        Example(pieces=((prompt, False), (choices[0], True)), choices=choices, answer=0)
        for prompt in ("? two blue: ", "?" + " red" * 300 + " two blue: ")
    )
    kept = len(tokenizer(short.prompt + choices[1])["input_ids"]) + 1
    (((_, expected),),) = score(model, [short], tokenizer)
    (((_, found),),) = score(model, [long], tokenizer, max_length=kept)
    assert found.choices == pytest.approx(expected.choices, rel=1e-4)


def test_what_is_skipped(model, tokenizer):
    examples = questions(CHOICES["one token differs"])
    everything = dict(pair for batch in score(model, examples, tokenizer) for pair in batch)
    rest = dict(pair for batch in score(model, examples, tokenizer, skip={0, 3}) for pair in batch)
    assert sorted(rest) == [1, 2, 4, 5]
    assert rest[4].nll == pytest.approx(everything[4].nll, rel=1e-5)


def test_a_cache_that_is_not_of_keys_and_values_is_not_shared():
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    assert not module.shares_prompts(MambaForCausalLM(MambaConfig(**sizes)))


@pytest.mark.parametrize("name", ["one token differs", "several tokens"])
def test_questions_in_a_chat_end_with_their_turn(model, tokenizer, name):
    choices = CHOICES[name]
    plain_question = Example(pieces=(("?", False), (choices[1], True)), choices=choices, answer=1, question="Which?")
    example = in_chat(plain_question, tokenizer)
    assert example.pieces[-1] == (choices[1] + "</s>", True)
    (((_, found),),) = score(model, [example], tokenizer)
    (row,) = encode_examples([example], tokenizer).rows
    assert found.nll == pytest.approx(-plain(model, row, end=True), rel=1e-4)
    assert found.choices[1] == pytest.approx(plain(model, row, end=False), rel=1e-4)
