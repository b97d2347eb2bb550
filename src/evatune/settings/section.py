"""`Section`: frozen dataclasses that convert and check their fields, and describe them by the text under each.

A field is a string, a number with a range, a choice (`Literal`), true or false, a list of strings or numbers, a mapping
from names to numbers or strings, or one of these or none. Values come from Python, from YAML or from the command line,
so a number may also be given as a string.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import math
import operator
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cache
from numbers import Real
from typing import Any, ClassVar, Literal, Self, TypeVar

from evatune.errors import EvaError, near_misses

Function = TypeVar("Function", bound=Callable[..., Any])
Part = TypeVar("Part", bound="Section")
_LISTS = (tuple, Sequence)
"""What lists are annotated as; both become tuples."""


def number(
    default: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> Any:
    """Return a dataclass field for numbers of at least `low` or above `above`, and at most `high` or below `below`."""
    limits = {"low": low, "above": above, "high": high, "below": below}
    return dataclasses.field(default=default, metadata=limits)


def same_as(cls: type[Section], name: str) -> Any:
    """Return a dataclass field with the default, range and text of a field of another section."""
    field = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return dataclasses.field(default=field.default, metadata={"text": field_docs(cls)[name], **field.metadata})


class Section:
    """A dataclass whose fields are converted and checked when it is built."""

    section: ClassVar[str] = ""
    """Name that errors put before the field."""
    main: ClassVar[str] = ""
    """The field that a plain value in place of the section means: `model: some/name`."""
    splits_names: ClassVar[bool] = False
    """Whether a string of plain names (`q_proj,v_proj`) means a list of them where a list or a pattern is allowed."""

    def __post_init__(self) -> None:
        hints = field_types(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name = f"{self.section}.{field.name}".lstrip(".")
            value = convert(getattr(self, field.name), hints[field.name], name, splits_names=self.splits_names)
            _check_range(value, field.metadata, name)
            object.__setattr__(self, field.name, value)

    @classmethod
    def field_names(cls) -> list[str]:
        """Return the names of the fields."""
        return [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @classmethod
    def of(cls, options: Mapping[str, Any], *, settings: Self | None = None, call: str) -> Self:
        """Return the settings of a call.

        Args:
            options: the keyword arguments of the call.
            settings: what they change; by default the defaults.
            call: name of the function, for errors.

        Raises:
            EvaError: there is no such option, or a value is out of range.
        """
        known = cls.field_names()
        for name in options:
            if name not in known:
                raise EvaError(
                    f"{call} has no option {name!r}{near_misses(name, known)}; its options are {', '.join(known)}."
                )
        return cls(**options) if settings is None else dataclasses.replace(settings, **options)  # type: ignore[type-var]

    def shared(self, cls: type[Section]) -> dict[str, Any]:
        """Return the fields that another section has too."""
        return {name: getattr(self, name) for name in cls.field_names() if name in self.field_names()}

    def part(self, cls: type[Part]) -> Part:
        """Return the section made of the fields that it has in common with this one."""
        return cls(**self.shared(cls))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values: lists instead of tuples."""
        return {name: _plain(getattr(self, name)) for name in self.field_names()}


def takes(cls: type[Section], *, without: Iterable[str] = ()) -> Callable[[Function], Function]:
    """Return a decorator for a function whose `**options` are fields of a section: `help` lists and explains them.

    Args:
        cls: the section.
        without: fields that the function does not take.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        hints, docs = field_types(cls), field_docs(cls)
        fields = [field for field in dataclasses.fields(cls) if field.name not in without]  # type: ignore[arg-type]
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        fields = [field for field in fields if field.name not in signature.parameters]
        options = [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
            for field in fields
        ]
        function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        wrap = textwrap.TextWrapper(width=112, initial_indent=" " * 4, subsequent_indent=" " * 8)
        lines = [wrap.fill(f"{field.name}: {docs[field.name]}") for field in fields]
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n" + "\n".join(lines) + "\n"
        return function

    return decorate


def field_types(cls: Any) -> dict[str, Any]:
    """Return the type of each field of a dataclass."""
    return _types(cls)


_types = cache(typing.get_type_hints)
"""Read once, since a sweep makes thousands of recipes."""


def field_docs(cls: Any) -> dict[str, str]:
    """Return the text of each field of a dataclass, on one line: what stands under it, in the class or its bases."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        texts |= _texts(base)
    texts |= {name: field.metadata["text"] for name, field in fields.items() if "text" in field.metadata}
    return {name: texts[name] for name in fields if name in texts}


@cache
def _texts(cls: Any) -> dict[str, str]:
    """Return the texts under the fields that stand in the source of one class."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    return {
        typing.cast(ast.Name, statement.target).id: " ".join(str(following.value.value).split())
        for statement, following in itertools.pairwise(body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }


def convert(value: Any, kind: Any, name: str, *, splits_names: bool = False, among: Any = None) -> Any:
    """Return `value` as `kind`, reading strings as the command line and YAML write them.

    Args:
        value: what was given.
        kind: type annotation of the field.
        name: what errors call it.
        splits_names: see `Section.splits_names`.
        among: the union that `kind` is a part of, for errors.

    Raises:
        EvaError: the value is not of this kind.
    """
    wanted = describe_kind(among or kind)
    wrong = EvaError(f"{name} is {value!r}, but must be {wanted}.")
    if _is_union(kind):
        options = typing.get_args(kind)
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if types.NoneType in options:
                return None
            raise wrong
        return convert(value, _meant(value, options, splits_names=splits_names), name, among=kind)
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise EvaError(f"{name} is {value!r}, but must be {wanted}{near_misses(str(value), choices)}.")
        return value
    if origin in _LISTS:
        return _list(value, typing.get_args(kind)[0], wrong)
    if origin is Mapping:
        return _mapping(value, typing.get_args(kind)[1], name, wanted)
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false", "yes", "no"):
        return value.lower() in ("true", "yes")
    if kind in (int, float):
        return _number(value, kind, wrong)
    if isinstance(value, kind):
        return value
    raise wrong


def _meant(value: Any, options: tuple[Any, ...], *, splits_names: bool) -> Any:
    """Return which kind of a union a value is to be read as: a list, a mapping, or else the first one."""
    kinds = [option for option in options if option is not types.NoneType]
    origins = {typing.get_origin(kind): kind for kind in kinds}
    lists = next((origins[origin] for origin in _LISTS if origin in origins), None)
    if lists is not None:
        is_plain = isinstance(value, str) and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", value) is not None
        if _is_list(value) or (is_plain and (splits_names if kinds[0] is str else "," in value)):
            return lists
    if Mapping in origins and isinstance(value, Mapping):
        return origins[Mapping]
    return kinds[0]


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def _list(value: Any, kind: Any, wrong: EvaError) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if not _is_list(value):
        raise wrong
    items = sorted(value) if isinstance(value, AbstractSet) else list(value)
    if kind is str:
        if not all(isinstance(item, str) and item for item in items):
            raise wrong
        return tuple(items)
    return tuple(_number(item, kind, wrong) for item in items)


def _mapping(value: Any, kind: Any, name: str, wanted: str) -> dict[str, Any]:
    if isinstance(value, str) or _is_list(value):  # as the command line writes it
        items = [value] if isinstance(value, str) else list(value)
        if not all(isinstance(item, str) and "=" in item for item in items):
            raise EvaError(f"{name} is {value!r}, but must be {wanted}: on the command line NAME=VALUE.")
        value = dict(item.split("=", 1) for item in items)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise EvaError(f"{name} is {value!r}, but must be {wanted}.")
    read = {key: str(item) if kind is str and type(item) is int else item for key, item in value.items()}
    return {key: convert(item, kind, f"{name} of {key!r}") for key, item in read.items()}


def _number(value: Any, kind: Any, wrong: EvaError) -> Any:
    if not isinstance(value, str | Real) or isinstance(value, bool):
        raise wrong
    try:
        read = float(value)  # also reads `5e-4`, which YAML takes for a string
    except (ValueError, OverflowError):
        raise wrong from None
    if not math.isfinite(read) or (kind is int and read != int(read)):
        raise wrong
    return kind(read)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def describe_kind(kind: Any) -> str:
    """Return a type annotation of a setting in words."""
    if _is_union(kind):
        return " or ".join(describe_kind(option) for option in typing.get_args(kind))
    origin = typing.get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if origin in _LISTS:
        return f"a list of {_PLURALS[typing.get_args(kind)[0]]}"
    if origin is Mapping:
        return f"a mapping from names to {_PLURALS[typing.get_args(kind)[1]]}"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", types.NoneType: "none"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "strings", object: "settings"}


def _check_range(value: Any, limits: Mapping[str, Any], name: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_range(item, limits, f"{name} of {key!r}")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    given = {key: limits[key] for key in _TESTS if limits.get(key) is not None}
    if not all(_TESTS[key][0](value, limit) for key, limit in given.items()):
        wanted = " and ".join(f"{_TESTS[key][1]} {limit}" for key, limit in given.items())
        raise EvaError(f"{name} is {value}, but must be {wanted}.")


_TESTS = {
    "low": (operator.ge, "at least"),
    "above": (operator.gt, "greater than"),
    "high": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
