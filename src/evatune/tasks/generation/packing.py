"""Several examples in one row, so that little of a batch is padding.

No position attends to another example: positions begin again with each, and there is no attention mask, so transformers
builds a mask of blocks from the positions. Padding at the end of a row has position 0 throughout: each padded position
is a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from evatune.errors import EvaError
from evatune.tasks.generation.encoding import IGNORED
from evatune.tasks.generation.likelihood import takes
from evatune.tasks.task import evaluating

_OPEN = 64
"""Rows that wait for a further example at the same time; more of them fill rows better and mix the order more."""
_LIKE = 0.02
"""Relative difference of logits up to which an example is taken not to have seen its neighbour, in bfloat16 too."""


def pack(rows: Iterable[Mapping[str, list[int]]], *, length: int) -> Iterator[dict[str, list[int]]]:
    """Put examples into rows of at most `length` tokens, each example whole.

    Args:
        rows: `input_ids` and `labels` of each example, none longer than `length`.
        length: tokens of a row.

    Yields:
        `input_ids`, `labels` and `position_ids` of each row. The first token of an example is not learned: it would be
        predicted from another one.

    Cost: O(examples).
    """
    waiting: list[dict[str, list[int]]] = []
    for row in rows:
        size = len(row["input_ids"])
        fitting = [one for one in waiting if len(one["input_ids"]) + size <= length]
        if fitting:
            place = max(fitting, key=lambda one: len(one["input_ids"]))  # the one with the least room
        else:
            place = {"input_ids": [], "labels": [], "position_ids": []}
            waiting.append(place)
        place["input_ids"] += row["input_ids"]
        place["labels"] += [IGNORED, *row["labels"][1:]]
        place["position_ids"] += range(size)
        if len(waiting) > _OPEN:
            yield waiting.pop(max(range(len(waiting)), key=lambda number: len(waiting[number]["input_ids"])))
    yield from waiting


def row_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """Return which positions of a batch of packed rows are tokens of examples, (rows, positions)."""
    positions = batch["position_ids"]
    following = torch.cat([positions[:, 1:], torch.zeros_like(positions[:, :1])], dim=1)
    return (positions > 0) | (following == 1)


def learned_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """Return which positions of a batch of packed rows predict a learned token, (rows, positions)."""
    learned = batch["labels"][:, 1:] != IGNORED
    return torch.cat([learned, torch.zeros_like(learned[:, :1])], dim=1)


@torch.inference_mode()
def check_keeps_apart(model: Any) -> None:
    """Check that a model lets no position attend to another example of its row.

    There are two rows, since some attention looks for examples in a batch of one row only.

    Cost: three passes of a few tokens.

    Raises:
        EvaError: an example has other logits behind another one than alone, or the model takes no positions.
    """
    device = next(model.parameters()).device
    if not takes(model, "position_ids"):
        raise EvaError(
            f"{type(model).__name__} takes no position_ids, so examples of one row would see each other; leave out "
            "data.packing."
        )
    n_tokens = min(model.get_input_embeddings().num_embeddings, 1000)
    tokens = torch.randint(n_tokens, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    begins = (9, 7)
    places = torch.stack([torch.cat([torch.arange(begin), torch.arange(16 - begin)]) for begin in begins]).to(device)
    with evaluating(model):
        packed = model(input_ids=tokens, position_ids=places).logits.float()
        for row, begin in enumerate(begins):
            ids, positions = tokens[row : row + 1, begin:], places[row : row + 1, begin:]
            alone = model(input_ids=ids, position_ids=positions).logits[0].float()
            difference = float((packed[row, begin:] - alone).norm() / alone.norm())
            if not difference <= _LIKE:
                raise EvaError(
                    f"{type(model).__name__} lets examples of one row see each other (logits differ by "
                    f"{difference:.0%}); leave out data.packing."
                )
