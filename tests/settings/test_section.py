"""What a section makes of values from Python, YAML and the command line, and what it says of wrong ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pytest

from evatune.errors import EvaError
from evatune.settings import Section, field_docs, number, same_as, takes


@dataclass(frozen=True, kw_only=True)
class Parent(Section):
    """A section that others take from."""

    count: int = number(3, low=1)
    """How many."""
    share: float | None = number(0.5, above=0, below=1)
    """How much of it,
    or none."""


@dataclass(frozen=True, kw_only=True)
class Child(Parent):
    """A section with one field of every kind."""

    names: str | Sequence[str] = "all"
    """Names or a pattern."""
    layers: int | Sequence[int] | None = None
    """Numbers."""
    ranks: int | Mapping[str, int] = number(4, low=1)
    """One number or one for each name."""
    kind: Literal["good", "better"] | None = "good"
    """A choice."""
    flag: bool = False
    """True or false."""


class Recipe(Child):
    section: ClassVar[str] = "part"
    splits_names: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", "8", 8),
        ("count", 8.0, 8),
        ("count", np.int64(8), 8),
        ("share", "5e-1", 0.5),
        ("share", "none", None),
        ("share", None, None),
        ("names", "q_proj", "q_proj"),
        ("names", ["q", "v"], ("q", "v")),
        ("names", {"v", "q"}, ("q", "v")),
        ("names", [], ()),
        ("layers", "3", 3),
        ("layers", "1,2", (1, 2)),
        ("layers", range(2), (0, 1)),
        ("ranks", {"a": 2.0}, {"a": 2}),
        ("kind", "none", None),
        ("flag", "yes", True),
    ],
)
def test_values_become_what_the_field_is(name, value, expected):
    found = getattr(Child(**{name: value}), name)
    assert found == expected and type(found) is type(expected)


def test_only_recipes_and_command_lines_split_a_string_of_names():
    assert Child(names="q,v").names == "q,v"  # a pattern, as PEFT takes strings
    assert Recipe(names="q,v").names == ("q", "v") and Recipe(names="q").names == ("q",)
    assert Recipe(names=".*q").names == ".*q"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, r"part\.count is 0, but must be at least 1\."),
        ("count", 1.5, r"count is 1\.5, but must be a whole number\."),
        ("count", True, "count is True, but must be a whole number"),
        ("count", None, "count is None, but must be a whole number"),
        ("share", 1, r"share is 1\.0, but must be greater than 0 and less than 1\."),
        ("share", float("inf"), "share is inf, but must be a number or none"),
        ("share", "nan", "share is 'nan', but must be a number or none"),
        ("names", [1], r"names is \[1\], but must be a string or a list of strings"),
        ("names", 3, "names is 3, but must be a string or a list of strings"),
        ("layers", "1,x", "layers is '1,x', but must be a whole number or a list of whole numbers or none"),
        ("ranks", {"a": 0}, "ranks of 'a' is 0, but must be at least 1"),
        ("ranks", {"a": "x"}, "ranks of 'a' is 'x', but must be a whole number"),
        ("ranks", {1: 1}, "ranks is .1: 1., but must be a whole number or a mapping from names to whole numbers"),
        ("kind", "god", "kind is 'god', but must be one of good, better or none .did you mean 'good'"),
        ("flag", "maybe", "flag is 'maybe', but must be true or false"),
    ],
)
def test_wrong_values_are_named_with_what_is_allowed(name, value, message):
    with pytest.raises(EvaError, match=message):
        Recipe(**{name: value})


def test_texts_are_inherited():
    docs = field_docs(Recipe)
    assert docs["count"] == "How many." and docs["share"] == "How much of it, or none."
    assert list(docs) == Recipe.field_names()


def test_a_field_can_be_taken_from_another_section():
    @dataclass(frozen=True, kw_only=True)
    class Other(Section):
        count: int = same_as(Parent, "count")

    assert Other().count == 3
    with pytest.raises(EvaError, match="count is 0, but must be at least 1"):
        Other(count=0)


def test_options_of_a_call():
    changed = Child.of({"count": "5"}, settings=Child(flag=True), call="run")
    assert changed == Child(count=5, flag=True)
    with pytest.raises(
        EvaError, match=r"run has no option 'cuont' \(did you mean 'count'\?\); its options are count, sh"
    ):
        Child.of({"cuont": 1}, call="run")


def test_parts_and_json():
    whole = Child(count=7, names=["a"], ranks={"a": 1})
    assert whole.part(Parent) == Parent(count=7)
    assert whole.to_json()["names"] == ["a"]
    assert Child(**whole.to_json()) == whole


def test_a_function_lists_the_options_that_it_takes():
    @takes(Child, without=("flag",))
    def run(thing: int, *, count: int = 1, **options: object) -> None:
        """Run."""

    assert run.__doc__ is not None and run.__doc__.startswith("Run.\n\nOptions:\n    share: How much of it, or none.\n")
    assert "flag" not in run.__doc__ and "count" not in run.__doc__
