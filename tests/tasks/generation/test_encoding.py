"""Tokens, labels, truncation, padding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from evatune.errors import EvaError
from evatune.models import load_tokenizer
from evatune.tasks.generation.encoding import Collator, encode_examples
from evatune.tasks.generation.example import Example
from evatune.tasks.task import batches


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def example(prompt: str, completion: str) -> Example:
    return Example(pieces=((prompt, False), (completion, True)))


def learned(row: dict[str, list[int]]) -> list[int]:
    return [label for label in row["labels"] if label != -100]


def test_the_completion_and_its_end_are_learned(tokenizer):
    (row,) = encode_examples([example("Is red true?\n", "the correct answer is true")], tokenizer).rows
    assert tokenizer.decode(learned(row)) == "the correct answer is true</s>"
    assert tokenizer.decode(row["input_ids"]) == "Is red true?\nthe correct answer is true</s>"
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_tokens_are_those_of_the_whole_text(tokenizer):
    """A boundary inside a word must not split it: the model would never see such tokens when it is used."""
    parts = example("the corr", "ect answer is true")
    (row,) = encode_examples([parts], tokenizer).rows
    whole = tokenizer(parts.text)["input_ids"]
    assert row["input_ids"] == [*whole, tokenizer.eos_token_id]
    assert tokenizer.decode(learned(row)) == "rect answer is true</s>"  # the token with the boundary in it is learned


def test_a_begin_token_is_read_and_not_learned(tiny_model):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tiny_model)
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    (row,) = encode_examples([example("", "red")], tokenizer).rows
    assert tokenizer.decode(row["input_ids"]) == "<s>red</s>"  # its own end token is not doubled
    assert tokenizer.decode(learned(row)) == "red</s>"


def test_train_on_prompt(tokenizer):
    (row,) = encode_examples([example("Is red?", " yes")], tokenizer, train_on_prompt=True).rows
    assert row["labels"] == row["input_ids"]


def test_pieces_between_others_are_learned(tokenizer):
    chat = Example(pieces=(("a b ", False), ("one two", True), (" c d ", False), ("red", True)), special_tokens=False)
    (row,) = encode_examples([chat], tokenizer).rows
    assert tokenizer.decode(learned(row)).replace(" ", "") == "onetwored"
    assert row["input_ids"] == tokenizer(chat.text)["input_ids"]  # no end token: the template wrote its own


def test_what_is_too_long_loses_the_beginning_of_its_prompt(tokenizer):
    text = example("first " + "red " * 50 + "last\n", "green")
    (whole,) = encode_examples([text], tokenizer).rows
    encoded = encode_examples([text, example("a", "b")], tokenizer, max_length=20)
    row = encoded[0]
    assert encoded.truncated == 1
    assert len(row["input_ids"]) == len(row["labels"]) == 20
    assert row["input_ids"][0] == whole["input_ids"][0]
    assert row["input_ids"][1:] == whole["input_ids"][-19:]
    assert learned(row) == learned(whole)

    (row,) = encode_examples([example("prompt ", "green " * 50)], tokenizer, max_length=10).rows
    assert len(row["input_ids"]) == 10
    assert learned(row)


def test_padding(tokenizer):
    encoded = encode_examples([example("Is red?", " yes"), example("Is red and green?", " no")], tokenizer)
    batch = Collator(tokenizer)([encoded[0], encoded[1]])
    lengths = [len(row["input_ids"]) for row in encoded.rows]
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, max(lengths))}
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert set(batch["labels"][0, lengths[0] :].tolist()) == {-100}
    assert set(batch["input_ids"][0, lengths[0] :].tolist()) == {tokenizer.pad_token_id}


def test_batches_are_the_same_in_every_pass_and_differ_with_the_seed(tokenizer):
    encoded = encode_examples([example("a", str(number)) for number in range(10)], tokenizer)
    task = SimpleNamespace(train=encoded, collate=Collator(tokenizer))

    def passed(seed: int | None) -> list[list[int]]:
        return [row for batch in batches(task, batch_size=4, seed=seed) for row in batch["labels"].tolist()]

    first = passed(0)
    assert len(first) == 10
    assert first == passed(0)
    assert first != passed(1)
    assert passed(None) == passed(None)
    assert len(list(batches(task, batch_size=4))) == 3


def test_a_slow_tokenizer_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(EvaError, match="use the model's fast tokenizer"):
        encode_examples([example("a", "b")], Slow())  # type: ignore[arg-type]


def test_truncation_at_the_right_cuts_the_end(tokenizer):
    text = example("first " + "red " * 50, "green blue")
    (whole,) = encode_examples([text], tokenizer).rows
    cut = encode_examples([text], tokenizer, max_length=20, truncation="right")
    assert cut.truncated == 1
    assert cut[0] == {name: values[:20] for name, values in whole.items()}
