"""Dataclasses whose fields are converted and checked when they are built, and described by the text under them.

The recipe is made of these. A field is a text, a number with a range, a choice (`Literal`), true or false, a list of
texts, or one of them or none.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Literal

from evatune.errors import EvaError, near_misses


def number(default: Any, *, low: float | None = None, above: float | None = None, high: float | None = None) -> Any:
    """Return a dataclass field for a number in the range [low, high], or (above, high]."""
    return dataclasses.field(default=default, metadata={"low": low, "above": above, "high": high})


class Section:
    """A dataclass whose fields are converted and checked when it is built."""

    section: ClassVar[str] = ""
    """Name that errors put before the field."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name = f"{self.section}.{field.name}".lstrip(".")
            value = convert(getattr(self, field.name), hints[field.name], name)
            _check_range(value, field.metadata, name)
            object.__setattr__(self, field.name, value)


@cache
def field_docs(cls: Any) -> dict[str, str]:
    """Return the text under each field of a dataclass and of those that it inherits from, on one line."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _own_field_docs(base)
    return docs


def _own_field_docs(cls: Any) -> dict[str, str]:
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    docs = {}
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            text = typing.cast(ast.Constant, following.value).value
            docs[typing.cast(ast.Name, statement.target).id] = " ".join(str(text).split())
    return docs


def convert(value: Any, kind: Any, name: str) -> Any:
    """Return `value` as `kind`, reading texts as the command line and YAML write them.

    Args:
        value: what was given.
        kind: type annotation of the field.
        name: what errors call it.

    Raises:
        EvaError: the value is not of this kind.
    """
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        options = typing.get_args(kind)
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if types.NoneType in options:
                return None
            raise EvaError(f"{name} is {value!r}, but must be {describe_kind(kind)}.")
        options = tuple(option for option in options if option is not types.NoneType)
        if str in options and len(options) > 1:  # plain names are a list, anything else is one text
            names = isinstance(value, list | tuple) or re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", str(value))
            return convert(value, tuple[str, ...] if names else str, name)
        return convert(value, options[0], name)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise EvaError(f"{name} is {value!r}, but must be {describe_kind(kind)}{near_misses(str(value), choices)}.")
        return value
    if typing.get_origin(kind) is tuple:
        items = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item for item in items):
            raise EvaError(f"{name} is {value!r}, but must be {describe_kind(kind)}.")
        return tuple(items)
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false", "yes", "no"):
        return value.lower() in ("true", "yes")
    if kind in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)  # also reads `5e-4`, which YAML takes for a text
            if kind is float and number == number:
                return number
            if kind is int and number == int(number):
                return int(number)
        except (ValueError, OverflowError):
            pass
    elif kind not in (int, float) and isinstance(value, kind):
        return value
    raise EvaError(f"{name} is {value!r}, but must be {describe_kind(kind)}.")


def describe_kind(kind: Any) -> str:
    """Return a type annotation of a setting in words."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(describe_kind(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list of texts"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "none"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def _check_range(value: Any, limits: Mapping[str, Any], name: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    low, above, high = limits.get("low"), limits.get("above"), limits.get("high")
    if (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high):
        return
    wanted = [f"at least {low}"] if low is not None else [f"greater than {above}"] if above is not None else []
    wanted += [f"at most {high}"] if high is not None else []
    raise EvaError(f"{name} is {value}, but must be {' and '.join(wanted)}.")
