"""Token classification: a tag for each word, such as the names of persons and places (`B-PER`, `I-PER`, `O`)."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evatune.errors import EvaError, near_misses
from evatune.settings import IGNORED_LABEL
from evatune.tasks.disk_list import empty_list
from evatune.tasks.examples import Convert
from evatune.tasks.rows import Row
from evatune.tasks.scores import Metric
from evatune.tasks.understanding.entities import entities, is_entity_tag
from evatune.tasks.understanding.kind import Encoded, Outcomes
from evatune.tasks.understanding.settings import UnderstandingData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS = ("tokens", "words")
"""Usual names of the column of words."""
TAGS = ("ner_tags", "tags", "labels", "pos_tags")
"""Usual names of the column of tags."""
ENTITIES = {
    "f1": Metric(columns=("twice_found", "entities"), statistic="ratio", form=".1%"),
    "precision": Metric(columns=("found", "predicted"), statistic="ratio", form=".1%"),
    "recall": Metric(columns=("found", "expected"), statistic="ratio", form=".1%"),
}
"""Of whole entities, over all sentences: one is found if its type and both its ends are right."""
WORD_METRICS = {
    "accuracy": Metric(columns=("right_words", "words"), statistic="ratio", form=".1%"),
    "loss": Metric(columns=("nll", "seen_words"), statistic="ratio"),
}
"""`accuracy`: share of the words whose tag is right. `loss`: mean negative log-likelihood of a word's tag, in nats."""
OUTSIDE = "O"
"""The tag of words that belong to no entity; words that were cut off get it."""


@dataclass(frozen=True, kw_only=True)
class Tagged:
    """One sentence."""

    words: tuple[str, ...]
    """Its words."""
    tags: tuple[str, ...]
    """The tag of each."""


@dataclass(frozen=True, kw_only=True)
class TokenClassification:
    """See `evatune.tasks.understanding.kind.Kind`."""

    data: UnderstandingData
    head = "token-classification"
    task_type = "TOKEN_CLS"
    problem_type = None
    targets = ("labels",)
    too_long = "cut at the {cut}"

    columns = f"{' or '.join(WORDS)}; and {' or '.join(TAGS)}"

    @property
    def stated(self) -> tuple[str, ...] | None:
        """Names of the tags, where the recipe says them."""
        return self.data.classes

    def converter(self, row: Row, source: str) -> Convert[Tagged]:
        """Return what makes a tagged sentence of each row.

        Raises:
            EvaError: no known column of words or of tags is there.
        """
        words = next((name for name in WORDS if name in row), None)
        tags = next((name for name in TAGS if name in row), None)
        if words is None or tags is None:
            missing, known = ("tokens", WORDS) if words is None else ("ner_tags", TAGS)
            raise EvaError(
                f"{source} has no column of {missing} that is known ({', '.join(known)}); it has "
                f"{', '.join(map(str, row))}: say which it is with columns ({missing}=NAME)."
            )
        return lambda row: self._read(row, words, tags)

    def _read(self, row: Row, words: str, tags: str) -> Tagged | None:
        for name in (words, tags):
            if not isinstance(row.get(name), list):
                raise EvaError(f"column {name!r} holds {row.get(name)!r}, which is not a list.")
        given, marks = row[words], row[tags]
        if len(given) != len(marks):
            raise EvaError(f"there are {len(given)} words in {words!r}, but {len(marks)} tags in {tags!r}.")
        if not all(isinstance(word, str) for word in given):
            raise EvaError(f"column {words!r} holds words that are not strings.")
        if not any(word.strip() for word in given):
            return None
        return Tagged(words=tuple(given), tags=tuple(self._tag(mark) for mark in marks))

    def _tag(self, mark: Any) -> str:
        known = self.data.classes
        if isinstance(mark, int) and not known:
            raise EvaError(f"the tags are numbers ({mark}): give their names in their order with data.classes.")
        if isinstance(mark, int) and known and 0 <= mark < len(known):
            return known[mark]
        if known and mark not in known:
            raise EvaError(f"tag {mark!r} is none of data.classes{near_misses(str(mark), known)}: {', '.join(known)}.")
        return str(mark)

    def labels(self, examples: Sequence[Tagged]) -> tuple[str, ...]:
        """Return the names of all tags, in the order of `data.classes` or of the alphabet.

        Raises:
            EvaError: there is only one tag.
        """
        names = {tag for example in examples for tag in example.tags}
        if len(names) < 2:
            raise EvaError(f"all training words have the tag {next(iter(names), '')!r}; two are needed at least.")
        return self.data.classes or tuple(sorted(names))

    def encode(
        self,
        examples: Sequence[Tagged],
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: Sequence[str],
        max_length: int,
        on_disk: bool = False,
    ) -> Encoded:
        """Return tokens, and the number of the tag at the first token of each word.

        Raises:
            EvaError: the tokenizer does not say where its tokens stand, or a tag is unknown.
        """
        if not tokenizer.is_fast:
            raise EvaError("token-classification needs a fast tokenizer, which says where its tokens stand.")
        numbers = {name: number for number, name in enumerate(labels)}
        rows = empty_list(on_disk=on_disk)
        cut = 0
        for example in examples:
            text = " ".join(example.words)
            whole: Any = tokenizer(
                text, truncation=True, max_length=max_length, return_offsets_mapping=True, verbose=False
            )
            places = _first_tokens(text, example.words, whole.pop("offset_mapping"))
            targets = [IGNORED_LABEL] * len(whole["input_ids"])
            for word, place in places.items():
                if (tag := example.tags[word]) not in numbers:
                    raise EvaError(
                        f"tag {tag!r} is none of the training data{near_misses(tag, labels)}; they are "
                        f"{', '.join(labels)}; name all of them with data.classes."
                    )
                targets[place] = numbers[tag]
            first, last = min(places, default=0), max(places, default=-1)
            cut += first > 0 or last < len(example.words) - 1
            rows.append(dict(whole) | {"labels": targets, "places": places, "words": example.words})
        return Encoded(rows, cut=cut)

    def blank(self, size: int, length: int) -> dict[str, Tensor]:
        """Return numbers of tags."""
        return {"labels": torch.zeros(size, length, dtype=torch.long)}

    def outputs(self, output: Any) -> Tensor:
        """Return the logits."""
        return output.logits

    def metrics(self, labels: Sequence[str]) -> Mapping[str, Metric]:
        """Return those of entities, if the tags are such, and those of words."""
        return (ENTITIES if all(map(is_entity_tag, labels)) else {}) | WORD_METRICS

    def outcomes(
        self, outputs: Sequence[Tensor], encoded: Encoded, examples: Sequence[Tagged], labels: Sequence[str]
    ) -> Outcomes:
        """Return counts of words and of entities of each sentence, and the `nll` of its words."""
        columns: dict[str, list[float]] = {}
        told: list[dict[str, Any]] = []
        for logits, row, example in zip(outputs, encoded.rows, examples, strict=True):
            log_probs = logits.log_softmax(dim=-1)
            places = row["places"]
            given = [OUTSIDE] * len(example.words)
            for word, place in places.items():
                given[word] = labels[int(log_probs[place].argmax())]
            expected, predicted = entities(example.tags), entities(given)
            found = len(expected & predicted)
            outcome = {
                "right_words": sum(one == other for one, other in zip(given, example.tags, strict=True)),
                "words": len(example.words),
                "seen_words": len(places),
                "nll": -sum(float(log_probs[place, row["labels"][place]]) for place in places.values()),
                "found": found,
                "predicted": len(predicted),
                "expected": len(expected),
                "twice_found": 2 * found,
                "entities": len(expected) + len(predicted),
            }
            for name, value in outcome.items():
                columns.setdefault(name, []).append(float(value))
            marked = [_marked(example.words, tags) for tags in (example.tags, given)]
            question = " ".join(example.words)
            told.append({"question": question, "expected": marked[0], "given": marked[1]})
            told[-1]["right"] = outcome["right_words"] == outcome["words"]
        return Outcomes(
            columns=columns,
            told=told,
            counts={name: int(sum(columns[name])) for name in ("words", "seen_words")},
        )

    def learned(self, row: dict[str, Any], labels: Sequence[str]) -> str:
        """Return the words with their tags, without those outside of entities."""
        places = row["places"]
        return _marked([row["words"][word] for word in places], [labels[row["labels"][at]] for at in places.values()])

    def facts(self, examples: Sequence[Tagged], labels: Sequence[str]) -> dict[str, Any]:
        """Return how many words have each tag."""
        sizes = Counter(tag for example in examples for tag in example.tags)
        return {"tags": {name: sizes[name] for name in labels}}

    def about(self, labels: Sequence[str]) -> str:
        """Return how many tags there are."""
        return f"{len(labels)} tags"


def _marked(words: Sequence[str], tags: Sequence[str]) -> str:
    """Return the words with their tags, without those outside of entities."""
    return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True) if tag != OUTSIDE)


def _first_tokens(text: str, words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Return the place of the first token of each word that has one.

    Args:
        text: the words, joined by spaces.
        words: the words.
        offsets: begin and end of each token in the text, equal for tokens that stand for nothing in it.
    """
    starts = list(accumulate((len(word) + 1 for word in words[:-1]), initial=0))
    places: dict[int, int] = {}
    for place, (begin, end) in enumerate(offsets):
        blank = len(text[begin:end]) - len(text[begin:end].lstrip())  # some tokens begin with the space before a word
        if begin + blank < end:
            places.setdefault(bisect_right(starts, begin + blank) - 1, place)
    return places
