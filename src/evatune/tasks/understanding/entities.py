"""Entities from the tags of words: IOB1, IOB2, BIOES and BILOU, read as CoNLL's script does."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TAG = re.compile(r"O|[BIESLU]-.+")
_BEGINS, _ENDS = ("B", "S", "U"), ("E", "S", "L", "U")


def is_entity_tag(tag: str) -> bool:
    """Return whether a tag says where an entity begins, goes on or ends, or that there is none (`O`)."""
    return _TAG.fullmatch(tag) is not None


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return type, first and last word of each entity of a sentence.

    Args:
        tags: one a word.
    """
    found: set[tuple[str, int, int]] = set()
    begun: tuple[str, int] | None = None
    before = "O"
    for place, tag in enumerate([*tags, "O"]):
        kind = tag[2:] if tag != "O" else ""
        goes_on = begun is not None and kind == begun[0] and tag[0] not in _BEGINS and before[0] not in _ENDS
        if begun is not None and not goes_on:
            found.add((begun[0], begun[1], place - 1))
            begun = None
        if kind and begun is None:
            begun = (kind, place)
        before = tag
    return found
