"""Measuring the stored model of a recipe without loading it whole, and what measuring it would take."""

from __future__ import annotations

import sys
from typing import Any

import torch

from evatune.activations import estimate, measure_from_disk
from evatune.activations.estimate import Estimate
from evatune.errors import EvaError
from evatune.recipe import Recipe
from evatune.spectra import Spectra
from evatune.tasks import find_domain
from evatune.tasks.task import Task
from evatune.training.setup import measured_batches


def estimate_recipe(recipe: Recipe) -> Estimate:
    """Return the memory and work that measuring takes, from the configuration of the recipe's model alone.

    Raises:
        EvaError: the rows of the recipe's task are not token ids, or see `evatune.estimate`.
    """
    stored = _stored(recipe)  # refuses tasks whose data have no length in tokens
    data: Any = recipe.data
    return estimate(_source(recipe), batch_size=recipe.measure.batch_size, length=data.max_length, **stored)


def measure_recipe_from_disk(recipe: Recipe, task: Task) -> Spectra:
    """Measure the recipe's stored model block by block.

    Args:
        recipe: says which model, and how it is measured.
        task: has the training data.

    Raises:
        EvaError: the rows of the task are not token ids, or see `evatune.measure_from_disk`.
    """
    return measure_from_disk(
        _source(recipe),
        measured_batches(recipe, task),
        progress=sys.stderr.isatty(),
        **_stored(recipe),
    )


def _source(recipe: Recipe) -> str:
    """Return what names the model, with the GGUF file in it."""
    name, file = recipe.model.name, recipe.model.gguf_file
    return f"{name}/{file}" if file else name


def _stored(recipe: Recipe) -> dict[str, Any]:
    """Return what both need to know of the stored model."""
    model, head = recipe.model, find_domain(recipe.task).head
    if head is None:
        raise EvaError(f"--dry-run and --from-disk need rows of token ids, which task {recipe.task!r} does not have.")
    return {
        "weights_dtype": getattr(torch, model.dtype),
        "head": head,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "settings": recipe.measuring,
    }
