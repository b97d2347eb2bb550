"""Answers that stand in a text: the best span, and how well it agrees with the expected ones (SQuAD's rules)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_TOKENS = 30
"""Longest answer that is looked for."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def best_span(scores_t2: Tensor, offsets: Sequence[tuple[int, int] | None], context: str) -> tuple[float, str]:
    """Return the score and the text of the best span of a window.

    Args:
        scores_t2: scores of each token as begin and as end.
        offsets: begin and end of each token in the context; None for tokens of the question.
        context: the text.

    Cost: the square of the number of tokens.
    """
    own = torch.tensor([span is not None for span in offsets])
    begins, ends = (column.masked_fill(~own, float("-inf")) for column in scores_t2.unbind(-1))
    sums_tt = begins[:, None] + ends[None, :]
    allowed_tt = torch.ones_like(sums_tt, dtype=torch.bool).triu().tril(MOST_TOKENS - 1)
    sums_tt = sums_tt.masked_fill(~allowed_tt, float("-inf"))
    first, last = divmod(int(sums_tt.argmax()), len(offsets))
    begin, end = offsets[first], offsets[last]
    if begin is None or end is None:
        return float("-inf"), ""
    return float(sums_tt[first, last]), context[begin[0] : end[1]].strip()


def agreement(given: str, expected: Sequence[str]) -> tuple[float, float]:
    """Return whether an answer equals an expected one, and its best F1 score over words.

    Args:
        given: the answer; empty for "there is none".
        expected: the answers that count as right; empty if there is none.
    """
    words = _words(given)
    right = [_words(one) for one in expected] or [[]]
    return float(any(words == one for one in right)), max(_f1(words, one) for one in right)


def _words(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return _ARTICLES.sub(" ", bare).split()


def _f1(given: Sequence[str], expected: Sequence[str]) -> float:
    if not given or not expected:
        return float(given == expected)
    shared = sum((Counter(given) & Counter(expected)).values())
    return 2 * shared / (len(given) + len(expected))
