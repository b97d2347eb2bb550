"""Options shared by the commands: each setting of the recipe becomes an option."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from evatune.files import json_text
from evatune.recipe import Recipe, Setting, all_settings, load_recipe
from evatune.settings import Planning, Section, field_docs, field_types
from evatune.tasks import DOMAINS

_TITLES = {"task": "task", "output": "output", "measure": "measuring", "train": "training"}
HELD_OUT = ("data.eval", "data.eval_split", "data.max_eval_examples")
"""Settings of the held-out data, for commands that use training data only."""
_METAVARS = {int: "N", float: "X", str: "TEXT"}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of examples and wraps paragraphs to the terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(shutil.get_terminal_size().columns - 2, 110))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            paragraph if "\n  " in paragraph else argparse.HelpFormatter._fill_text(self, paragraph, width, indent)
            for paragraph in paragraphs
        )


def add_recipe_options(
    parser: argparse.ArgumentParser, *wanted: str, without: Sequence[str] = (), file: bool = True
) -> None:
    """Add a recipe file and an option for each wanted setting.

    Args:
        parser: the command's parser.
        wanted: sections (`train`) or single settings (`adapter.rank`, `output`).
        without: settings of these sections that the command has no use for.
        file: add the recipe file as the first argument.
    """
    if file:
        parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file; every option below overrides it")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in all_settings():
        section = setting.path.rpartition(".")[0] or setting.path
        if setting.path not in without and (setting.path in wanted or section in wanted):
            title = _TITLES.get(section, section)
            if setting.tasks:
                title += f" of task {' and '.join(setting.tasks)}"
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            # Where two sections have a name, its short form means the one of training, or the only one here.
            short = "--" + setting.path.rpartition(".")[2].replace("_", "-")
            is_meant = "." in setting.option and (section == "train" or "train" not in wanted)
            _add(groups[title], setting, *([short] if is_meant else []))


def add_options(group: argparse._ArgumentGroup, section: type[Section]) -> None:
    """Add an option for each field of a section; `given_options` reads them."""
    kinds, docs = field_types(section), field_docs(section)
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        option = "--" + field.name.replace("_", "-")
        kind, text = kinds[field.name], docs[field.name]
        _add(group, Setting(path=field.name, option=option, kind=kind, default=field.default, help=text))


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given on the command line, by name."""
    given = {name.removeprefix("setting:"): value for name, value in vars(args).items() if name.startswith("setting:")}
    for setting in all_settings():
        # One word may be a regular expression, `all-linear` or `none`, if the setting is not always a list.
        if len(_kinds(setting)) > 1 and isinstance(words := given.get(setting.path), list) and len(words) == 1:
            given[setting.path] = words[0]
    return given


def _add(group: argparse._ArgumentGroup, setting: Setting, *short: str) -> None:
    options: dict[str, Any] = {"dest": f"setting:{setting.path}", "default": argparse.SUPPRESS}
    text = re.sub(r"`(\w+)`", r"\1", setting.help).rstrip(".").replace("%", "%%")
    text = text[0].lower() + text[1:] if text[1].islower() else text
    default = setting.default
    if default not in (None, "", ()):
        shown = (
            str(default).lower()
            if isinstance(default, bool)
            else f"{default:g}"
            if isinstance(default, float)
            else default
        )
        text += f" (default: {shown})"
    if setting.kind is bool:
        group.add_argument(*short, setting.option, action=argparse.BooleanOptionalAction, help=text, **options)
        return
    kinds = _kinds(setting)
    if any(typing.get_origin(kind) is Literal for kind in kinds):
        options["metavar"] = "{" + ",".join(typing.get_args(kinds[0])) + "}"
    else:
        options["metavar"] = _METAVARS.get(kinds[0], "TEXT")
    if any(typing.get_origin(kind) in (tuple, Sequence) for kind in kinds):
        named = "NAME" if str in kinds else options["metavar"]
        options |= {"nargs": "+", "metavar": "FILE" if setting.is_path else named}
    elif typing.get_origin(kinds[0]) is Mapping:
        options |= {"nargs": "+", "metavar": "NAME=VALUE"}
    elif setting.path == "adapter.plan":
        options["metavar"] = "FILE"
    elif setting.path in ("output", "measure.spectra"):
        options["metavar"] = "FOLDER"
    elif setting.path == "task":
        options["metavar"] = "{" + ",".join(DOMAINS) + "}"
    group.add_argument(*short, setting.option, help=text, **options)


def recipe_from(args: argparse.Namespace, *, path: str | None = None) -> Recipe:
    """Return the recipe of the command line: file, then options.

    Args:
        args: parsed arguments.
        path: recipe file to take where none is named.
    """
    return load_recipe(args.recipe or path, given_options(args))


def _kinds(setting: Setting) -> tuple[Any, ...]:
    return typing.get_args(setting.kind) if typing.get_origin(setting.kind) is types.UnionType else (setting.kind,)


def add_view_options(parser: argparse.ArgumentParser, *, save_required: bool = False) -> None:
    """Add what figures and tables are made of; `view_options` reads it."""
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a folder of results, or folders of spectra")
    parser.add_argument("--save", metavar="FILE", required=save_required, help="write it to this file")
    parser.add_argument("--overwrite", action="store_true", help="replace this file if it exists")
    group = parser.add_argument_group("of results")
    add_result_options(group)
    group.add_argument("--task", metavar="NAME", help="the task, for what shows a single one (default: the first)")
    group = parser.add_argument_group("of spectra")
    group.add_argument("--rhos", type=float, nargs="+", metavar="X", help="values of rho (default: 1 1.5 2)")
    add_options(group, Planning)


def add_result_options(group: argparse._ActionsContainer) -> None:
    """Add which scores of results count, and which method they are compared with."""
    group.add_argument("--score", metavar="NAME", help="the metric that counts (default: the sweep's or the headline)")
    group.add_argument("--against", metavar="METHOD", help="the method that others are compared with (default: lora)")


def view_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `evatune.exhibits.view.View`."""
    given = {name: getattr(args, name) for name in ("score", "against", "task") if getattr(args, name) is not None}
    if args.rhos:
        given["rhos"] = tuple(args.rhos)
    planning = given_options(args)
    Planning(**planning)  # a wrong value is told before anything is read
    return given | {"folders": tuple(args.folders), "planning": planning}


def say(text: str) -> None:
    """Print progress on standard error, since standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def terminal_width() -> int | None:
    """Return how many characters a line of the terminal has; None where the output is none, such as a file."""
    return shutil.get_terminal_size((0, 0)).columns or None


def answer(args: argparse.Namespace, *, text: str, content: Any) -> None:
    """Print the result: as text, or with `--json` as one object."""
    print(json_text(content) if args.json else text, file=args.standard_output)
    args.answered = True
