"""Held-out loss and accuracy against a plain computation, one example at a time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.on_device import IN_INFERENCE_MODE

from evatune.errors import EvaError
from evatune.tasks.generation import evaluation as evaluation_module
from evatune.tasks.generation import likelihood as likelihood_module
from evatune.tasks.generation.encoding import encode_examples
from evatune.tasks.generation.evaluation import evaluate
from evatune.tasks.generation.example import Example
from evatune.tasks.generation.examples import load_examples
from evatune.tasks.journal import Journal

pytestmark = pytest.mark.on_hardware(IN_INFERENCE_MODE)


@pytest.fixture(scope="module")
def questions(tiny_data):
    return load_examples(tiny_data / "test.jsonl")


@torch.no_grad()
def log_likelihood(model, row) -> float:
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
    log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
    kept = labels != -100
    return log_probs[kept].gather(1, labels[kept, None]).sum().item()


def plain_loss(model, examples, tokenizer) -> float:
    rows = encode_examples(examples, tokenizer).rows
    n_tokens = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    return -sum(log_likelihood(model, row) for row in rows) / n_tokens


def plain_accuracy(model, examples, tokenizer) -> float:
    right = 0
    for example in examples:
        variants = [Example(pieces=(*example.pieces[:-1], (choice, True))) for choice in example.choices]
        rows = [
            {name: values[:-1] for name, values in row.items()} for row in encode_examples(variants, tokenizer).rows
        ]
        scores = [log_likelihood(model, row) for row in rows]  # without the end token
        right += scores.index(max(scores)) == example.answer
    return right / len(examples)


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_loss_and_accuracy(model, tokenizer, questions, batch_tokens):
    model.train()
    result = evaluate(model, questions, tokenizer, batch_tokens=batch_tokens, progress=False)
    assert model.training  # the mode is restored
    model.eval()
    assert result["loss"] == pytest.approx(plain_loss(model, questions, tokenizer), rel=1e-5)
    assert result["accuracy"] == plain_accuracy(model, questions, tokenizer)
    assert (result.counts["examples"], result.counts["questions"]) == (16, 16)


@pytest.mark.parametrize(
    "choices",
    [("red green", "red blue one", "two"), ("red one", "two blue"), ("green", "true one"), ("red", "red two")],
)
def test_choices_of_several_tokens(model, tokenizer, choices):
    examples = [
        Example(pieces=((f"{word}: ", False), (choices[answer], True)), choices=choices, answer=answer)
        for word in ("green", "one", "blue two", "true", "red", "?", "two two two", "false green", "is")
        for answer in range(len(choices))
    ]
    result = evaluate(model, examples, tokenizer, progress=False)
    assert result["accuracy"] == plain_accuracy(model, examples, tokenizer)
    assert result["loss"] == pytest.approx(plain_loss(model, examples, tokenizer), rel=1e-5)
    # Which choice wins, question by question, not only how many were right.
    for example in examples[:: len(choices)]:
        assert evaluate(model, [example], tokenizer, progress=False)["accuracy"] == plain_accuracy(
            model, [example], tokenizer
        )


def test_models_that_always_compute_all_logits(model, tokenizer, questions, monkeypatch):
    expected = evaluate(model, questions, tokenizer, progress=False)
    monkeypatch.setattr(likelihood_module, "takes", lambda model, argument: False)
    result = evaluate(model, questions, tokenizer, progress=False)
    assert (result["loss"], result["accuracy"]) == (pytest.approx(expected["loss"]), expected["accuracy"])


def test_text_has_a_loss_and_no_accuracy(model, tokenizer):
    texts = [Example(pieces=(("red green blue", True),)), Example(pieces=(("one", True),))]
    result = evaluate(model, texts, tokenizer, progress=False)
    assert set(result.metrics) == {"loss", "exact"}
    assert result["loss"] == pytest.approx(plain_loss(model, texts, tokenizer), rel=1e-5)
    assert torch.isfinite(torch.tensor(result["loss"]))


def test_bf16_is_close(model, tokenizer, questions):
    exact = evaluate(model, questions, tokenizer, progress=False)
    rough = evaluate(model, questions, tokenizer, bf16=True, progress=False)
    assert rough["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert rough["loss"] != exact["loss"]


class Foresight(torch.nn.Module):
    """Predicts every next token rightly, except one that it never predicts."""

    def __init__(self, never: int) -> None:
        super().__init__()
        self.never = never
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask, use_cache):
        following = input_ids.roll(-1, dims=1)
        logits = torch.nn.functional.one_hot(following, 400).float() * (following != self.never).unsqueeze(-1)
        return SimpleNamespace(logits=logits + self.anchor)


def test_a_completion_is_exact_if_each_of_its_tokens_is_the_most_probable(tokenizer):
    examples = [Example(pieces=((f"{word}: ", False), (word, True))) for word in ("red", "two green", "blue")]
    rows = encode_examples(examples, tokenizer).rows
    never = next(token for token in rows[2]["labels"] if token not in (-100, *rows[0]["labels"], *rows[1]["labels"]))
    assert evaluate(Foresight(never), examples, tokenizer, progress=False)["exact"] == pytest.approx(2 / 3)
    assert evaluate(Foresight(tokenizer.eos_token_id), examples, tokenizer, progress=False)["exact"] == 0
    prompt_token = next(token for token in rows[0]["input_ids"] if token not in rows[0]["labels"])
    assert evaluate(Foresight(prompt_token), examples[:1], tokenizer, progress=False)["exact"] == 1


def test_each_task_and_their_mean(model, tokenizer):
    choices = ("red", "one")
    examples = [
        Example(pieces=((f"{word}: ", False), (choices[answer], True)), choices=choices, answer=answer, task=task)
        for task, words in (("a", ("green", "two", "blue")), ("b", ("true",)))
        for word in words
        for answer in (0, 1)
    ]
    result = evaluate(model, examples, tokenizer, progress=False)
    of_a, of_b = (evaluate(model, part, tokenizer, progress=False)["accuracy"] for part in (examples[:6], examples[6:]))
    assert (result["accuracy/a"], result["accuracy/b"]) == (of_a, of_b)
    assert result["accuracy/mean"] == pytest.approx((of_a + of_b) / 2)
    assert result.interval("accuracy/mean") is not None


def test_written_answers(model, tokenizer, monkeypatch):
    examples = [
        Example(pieces=(("q", False), ("#### 7", True)), question="3 + 4?", expected="7", judge="number"),
        Example(pieces=(("q", False), ("#### 8", True)), question="4 + 4?", expected="8", judge="number"),
        Example(pieces=(("only text", True),)),
    ]
    texts = {0: ["#### 7", "so 6", "no"], 1: ["#### 8", "8", "8.0"]}
    monkeypatch.setattr(
        evaluation_module,
        "write_answers",
        lambda *args, skip, **options: [[(index, found)] for index, found in texts.items() if index not in skip],
    )
    result = evaluate(model, examples, tokenizer, scoring="both", progress=False)
    assert result["generated"] == pytest.approx((1 / 3 + 1) / 2)
    assert result.counts | {"tokens": 0} == {
        "examples": 3, "tokens": 0, "shortened": 0, "questions": 0, "answers": 6, "unparsed": 1, "dropped": 0,
        "shortened_prompts": 0,
    }  # fmt: skip
    assert set(result.metrics) == {"loss", "exact", "generated"}
    assert [(example["given"], example["right"]) for example in result.examples[:2]] == [("7", True), ("8", True)]
    written = result.examples[0]["written"]  # the first answer is that of the example
    assert [(answer["given"], answer["right"]) for answer in written] == [("7", True), ("6", False), (None, False)]
    longer = replace(examples[1], pieces=(("q" * 40, False), ("#### 8", True)))
    cut = evaluate(model, [examples[0], longer], tokenizer, scoring="generated", max_prompt=8, progress=False)
    assert cut.counts["shortened_prompts"] == 1
    alone = evaluate(model, examples, tokenizer, scoring="generated", progress=False)
    assert (alone.headline, set(alone.metrics)) == ("generated", {"generated"})
    with pytest.raises(EvaError, match=r"no written answer can be judged; set data\.scoring to likelihood"):
        evaluate(model, examples[2:], tokenizer, scoring="generated", progress=False)


def test_a_stopped_evaluation_goes_on(model, tokenizer, questions, monkeypatch):
    whole = evaluate(model, questions, tokenizer, scoring="both", batch_tokens=200, progress=False)
    for one in whole.examples:  # what is most probable stays known beside what was written
        assert one["likelihoods"][one["choices"].index(one["likeliest"])] == max(one["likelihoods"])
    journal = Journal()
    real = evaluation_module.score

    def stopped(*args, **options):
        for number, batch in enumerate(real(*args, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(evaluation_module, "score", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, questions, tokenizer, scoring="both", batch_tokens=200, progress=False, journal=journal)
    done = len(journal.known("likelihood"))
    assert 0 < done < len(questions)
    monkeypatch.setattr(evaluation_module, "score", real)
    again = evaluate(model, questions, tokenizer, scoring="both", batch_tokens=200, progress=False, journal=journal)
    for name, values in whole.outcomes.items():
        assert again.outcomes[name] == pytest.approx(values, rel=1e-5)
    assert [row["given"] for row in again.examples] == [row["given"] for row in whole.examples]
