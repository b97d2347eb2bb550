"""The lines of a file of records: what runs share is written once, and long lists are short.

A line is a record, or `{"shared": key, "value": ...}`, a value that later lines refer to. In a record

    {"$like": key, ...}      is the shared value of that key, with these entries changed;
    {"$table": {...}}        is a list of mappings with the same keys, a column for each key;
    {"$digits": "0110"}      is a list of whole numbers from 0 to 9;
    {"$range": [1, 60]}      is the list of the whole numbers from the first to the last.

So a record takes a third of its plain JSON, without losing anything. Plain records may stand in the same file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from evatune.files import json_text

SHARED = ("recipe", "versions", "machine", "fingerprints", "data", "parameters", "before")
"""Entries of a record that are the same, or nearly, in many runs: they are shared at once."""
LEAST_LENGTH = 8
"""Shorter lists stay as they are."""
KEY_LENGTH = 8
"""Hexadecimal digits of the hash of a shared value."""

_LIKE, _TABLE, _DIGITS, _RANGE = "$like", "$table", "$digits", "$range"


class Packer:
    """Turns records into lines and back; it remembers the shared values of a file."""

    def __init__(self) -> None:
        self._shared: dict[str, Any] = {}

    def lines(self, record: Mapping[str, Any]) -> str:
        """Return the lines that add a record to the file: shared values that are new in it, and the record's own."""
        added: list[dict[str, Any]] = []
        plain = json.loads(json_text(record))
        own = {key: self._like(key, value, added) if isinstance(value, dict) else value for key, value in plain.items()}
        return "".join(_dense(line) + "\n" for line in [*added, own])

    def read(self, line: str) -> dict[str, Any] | None:
        """Return the record of a line; None if the line is a shared value.

        Raises:
            ValueError: the line is no JSON.
            KeyError: a shared value that it refers to is in no line before.
            TypeError: it is something else.
        """
        content = _unpacked(json.loads(line), self._shared)
        if "shared" in content:
            self._shared[content["shared"]] = content["value"]
            return None
        _ = content["name"], content["state"], content["recipe"]
        return content

    def _like(self, entry: str, value: dict[str, Any], added: list[dict[str, Any]]) -> Any:
        """Return a value by the shared one that is nearest to it; of some entries, one that is like none is shared."""
        found = [
            {_LIKE: key, **difference}
            for key, shared in self._shared.items()
            if (difference := _difference(shared, value)) is not None
        ]
        nearest = min(found, key=lambda one: len(_dense(one)), default=None)
        saved = len(_dense(value)) - len(_dense(nearest)) if nearest is not None else 0
        if nearest is not None and saved > (len(_dense(nearest)) if entry in SHARED else 0):
            return nearest
        if entry not in SHARED:
            return value
        key = hashlib.sha256(json_text(value).encode()).hexdigest()[:KEY_LENGTH]
        if key not in self._shared:
            self._shared[key] = value
            added.append({"shared": key, "value": value})
        return {_LIKE: key}


def _dense(value: Any) -> str:
    return json.dumps(_packed(value), separators=(",", ":"), ensure_ascii=False)


def _difference(shared: Any, value: Any) -> dict[str, Any] | None:
    """Return the entries that a mapping changes or adds to a shared one; None if it lacks one of its keys."""
    if not isinstance(shared, dict) or not isinstance(value, dict) or not shared.keys() <= value.keys():
        return None
    changed: dict[str, Any] = {}
    for key, item in value.items():
        if key in shared and _same(shared[key], item):
            continue
        inner = _difference(shared[key], item) if key in shared else None
        if inner is None and isinstance(item, dict) and isinstance(shared.get(key), dict):
            return None
        changed[key] = item if inner is None else inner
    return changed


def _same(first: Any, second: Any) -> bool:
    """Return whether two values are the same JSON; 1, 1.0 and true are not."""
    return json.dumps(first) == json.dumps(second)


def _changed(shared: Any, difference: Any) -> Any:
    if not isinstance(shared, dict) or not isinstance(difference, dict):
        return difference
    return shared | {key: _changed(shared.get(key), item) for key, item in difference.items()}


def _packed(value: Any) -> Any:
    """Return a value with its long lists in their short forms."""
    if isinstance(value, dict):
        return {key: _packed(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    if len(value) >= LEAST_LENGTH:
        if all(type(item) is int for item in value):
            if value == list(range(value[0], value[0] + len(value))):
                return {_RANGE: [value[0], value[-1]]}
            if set(value) <= set(range(10)):
                return {_DIGITS: "".join(map(str, value))}
        keys = list(value[0]) if isinstance(value[0], dict) else []
        if keys and all(isinstance(item, dict) and list(item) == keys for item in value):
            return {_TABLE: {key: _packed([item[key] for item in value]) for key in keys}}
    return [_packed(item) for item in value]


def _unpacked(value: Any, shared: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, shared) for item in value]
    if not isinstance(value, dict):
        return value
    content = {key: _unpacked(item, shared) for key, item in value.items()}
    if _LIKE in content:
        return _changed(shared[content.pop(_LIKE)], content)
    if _TABLE in content:
        columns = content[_TABLE]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if _DIGITS in content:
        return list(map(int, content[_DIGITS]))
    if _RANGE in content:
        first, last = content[_RANGE]
        return list(range(first, last + 1))
    return content
