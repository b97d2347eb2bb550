"""`evatune collect`: make training data, for tasks that make their own."""

from __future__ import annotations

import argparse

from evatune.cli.options import add_recipe_options, answer, recipe_from, say
from evatune.tasks import collecting_domains

SUMMARY = "make training data, for tasks that make their own"
USAGE = "[RECIPE]"
DESCRIPTION = f"""
Make the training data that a recipe asks for and keep them as a data set of their own (tasks:
{", ".join(collecting_domains())}).
`evatune finetune` does the same by itself, in the user's cache. Data that are there already are kept and added to, so
an interrupted command can be given again.
"""
EXAMPLES = """
examples:
  evatune collect --task control --data hammer push --episodes 50 --output episodes --processes 2
  evatune collect --task control --data MT40 --episodes 100 --noise 0.2 --output episodes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_recipe_options(parser, "task", "data", "output")
    group = parser.add_argument_group("collect")
    group.add_argument("--processes", type=int, default=1, metavar="N", help="processes side by side (default: 1)")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from evatune.errors import EvaError
    from evatune.tasks import collect

    if args.processes < 1:
        raise EvaError(f"--processes is {args.processes}, but must be at least 1.")
    recipe = recipe_from(args)
    recipe.require("data", "output")
    collected = collect(recipe.task, recipe.data, folder=recipe.output, processes=args.processes, say=say)
    answer(args, text=collected.text, content=collected.content)
