"""Whether the loss's curvature at the start tells the best learning rate of a method, once that of LoRA is known.

    EVATUNE_DATA=path/to/data python benchmarks/suggest_rate.py

For every method of a sweep (by default `sweeps/understanding-sst2.yaml`): the eigenvalue of largest magnitude of the
Hessian of the loss, over all that the method trains but the task's new head, where the runs on validation data start.
The rates that these runs chose are compared with what the eigenvalues and the best rate of LoRA alone would have
predicted.

AdamW divides a gradient by its size, so its steps have the unit of the parameters, whatever the loss is multiplied
with. An eigenvalue has the unit of loss / parameter². So the rate goes as 1 / sqrt(eigenvalue): with twice as large
an A, steps of B of half the size do the same, and their curvature is four times as large. For plain gradient descent
it goes as 1 / eigenvalue, which is shown beside it, and so is the simplest prediction of all: the rate of LoRA for
every method.

Eigenvalues that the results have already are not computed again. Writes `benchmarks/results/suggest_rate.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evatune.activations.gradients import batch_loss
from evatune.analyses.curvature import curvature
from evatune.compare.results import Results
from evatune.compare.runs import Run, cells, points, runs_of
from evatune.compare.sweep import Sweep
from evatune.errors import EvaError
from evatune.files import write_json
from evatune.hardware import describe_machine
from evatune.methods import at_home
from evatune.recipe import Recipe
from evatune.spectra import Spectra
from evatune.tables import text_table
from evatune.tasks.task import batches
from evatune.training.record import library_versions
from evatune.training.setup import load_base, measure_recipe, measures, new_adapter, open_recipe

ROOT = Path(__file__).parents[1]
RATE = "train.learning_rate"
POWERS = {"1 / sqrt(eigenvalue)": 0.5, "1 / eigenvalue": 1.0, "the rate of the reference": 0.0}
FACTOR = 2.0
"""A prediction counts as right within this factor of the best rate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweep", type=Path, default=ROOT / "sweeps" / "understanding-sst2.yaml")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "compare" / "understanding-sst2")
    parser.add_argument("--methods", nargs="+", help="of the sweep; by default all")
    parser.add_argument("--reference", default="lora", help="the method whose best rate is known")
    parser.add_argument("--batches", type=int, default=2, help="batches of the size of a training step")
    parser.add_argument("--products", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", type=Path, default=ROOT / "benchmarks" / "results" / "suggest_rate.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {"sweep": options.sweep.name, "batches": options.batches, "products": options.products}
    kept = json.loads(options.save.read_text(encoding="utf-8")) if options.save.is_file() else {}
    found: dict[str, Any] = kept.get("methods", {}) if kept.get("settings") == settings else {}
    choices = Results(options.results).choices
    spectra: dict[str, Spectra] = {}
    for cell in cells(Sweep.load(options.sweep)):
        label = cell.label
        if (options.methods is None or label in options.methods) and label not in found:
            run = runs_of(cell, "validation", points(cell.contender.grid)[0])[0]
            try:
                found[label] = facts = one_method(run, options, spectra)
            except EvaError as error:  # the task refuses the method
                print(f"{label}: {error}", flush=True)
                continue
            print(f"{label}: {facts['eigenvalue']:.3g} in {facts['seconds']:.1f} s", flush=True)
        content = {
            "settings": settings,
            "methods": found,
            "predictions": predictions(found, choices, reference=options.reference),
            "machine": describe_machine(),
            "versions": library_versions(),
        }
        write_json(options.save, content, indent=1)
    print(page(found, content["predictions"]))


def one_method(run: Run, options: argparse.Namespace, spectra: dict[str, Spectra]) -> dict[str, Any]:
    """Return the ends of the spectrum at the start of a run, and what they took beside a training step.

    Args:
        run: gives the recipe, whose rate does not count.
        options: how many batches and products.
        spectra: what was measured for other methods; it grows.
    """
    recipe = run.recipe
    task = open_recipe(recipe)
    model = load_base(recipe, task)
    heads = task.needs(model).heads
    measured = None
    if measures(recipe):
        key = run.spectra_key or run.name
        measured = spectra.get(key) or measure_recipe(recipe, model, task=task, progress=False)
        spectra[key] = measured
    adapted, _ = new_adapter(recipe, model, measured, task=task, total_steps=recipe.train.steps)
    adapted.eval()
    drawn = batches(task, batch_size=recipe.train.batch_size, seed=recipe.train.seed)
    few = list(itertools.islice(drawn, options.batches))
    scales = {name: unit for name, unit in units(adapted, recipe).items() if not is_part(name, heads)}
    started = time.perf_counter()
    found = curvature(adapted, few, batch_loss, scales=scales, n_products=options.products)
    seconds = time.perf_counter() - started
    return {
        "eigenvalue": found.sharpness,
        "largest": found.largest,
        "smallest": found.smallest,
        "residual": found.residual,
        "parameters": sum(adapted.get_parameter(name).numel() for name in scales),
        "seconds": seconds,
        "steps": seconds / step_seconds(adapted, few[0]),
    }


def units(model: torch.nn.Module, recipe: Recipe) -> dict[str, float]:
    """Return the learning rate of each trained parameter over that of the recipe: LoRA+ has two."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    home = recipe.adapter.choice.optimizer
    if not home:
        return dict.fromkeys(trained, 1.0)
    groups = at_home(home)(model, recipe.train).param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    return {name: rates[id(parameter)] / recipe.train.learning_rate for name, parameter in trained.items()}


def is_part(name: str, modules: tuple[str, ...]) -> bool:
    """Return whether a parameter is of one of these modules, at any depth of the model."""
    return any(f".{module}." in f".{name}" for module in modules)


def step_seconds(model: torch.nn.Module, batch: Any) -> float:
    """Return what a training step with this batch takes; the second of two is timed, and nothing is changed."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        batch_loss(model, batch).backward()
        seconds = time.perf_counter() - started
        model.zero_grad(set_to_none=True)
    return seconds


def predictions(
    found: Mapping[str, Mapping[str, Any]], choices: list[dict[str, Any]], *, reference: str
) -> dict[str, dict[str, Any]]:
    """Return for each rule and method the predicted rate, and the best one and their ratio where it is known.

    Args:
        found: the eigenvalue of each method.
        choices: what the sweep chose, of one task.
        reference: the method that the constant is taken of.
    """
    best = {choice["method"]: choice["point"][RATE] for choice in choices if choice["point"] and not choice["open"]}
    if reference not in best or reference not in found:
        return {}
    rules = {}
    for rule, power in POWERS.items():
        constant = best[reference] * found[reference]["eigenvalue"] ** power
        methods = {}
        for name, facts in found.items():
            if name != reference:
                rate = constant / facts["eigenvalue"] ** power
                methods[name] = {"predicted": rate, "best": best.get(name)}
        known = [method for method in methods.values() if method["best"]]
        right = [method for method in known if abs(math.log(method["predicted"] / method["best"])) <= math.log(FACTOR)]
        rules[rule] = {"methods": methods, "known": len(known), "within_factor_2": len(right)}
    return rules


def page(found: Mapping[str, Mapping[str, Any]], rules: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the tables for a terminal."""
    rows = [
        [name, *(f"{facts[key]:.3g}" for key in ("largest", "smallest", "residual", "seconds", "steps"))]
        for name, facts in found.items()
    ]
    text = text_table(["method", "largest", "smallest", "residual", "seconds", "steps"], rows)
    if not rules:
        return f"{text}\n\nThe best rate of the reference is not known."
    names = list(next(iter(rules.values()))["methods"])
    rows = []
    for name in names:
        best = next(iter(rules.values()))["methods"][name]["best"]
        predicted = [f"{rule['methods'][name]['predicted']:.2g}" for rule in rules.values()]
        rows.append([name, f"{best:g}" if best else "not known", *predicted])
    rows.append(
        ["within a factor of 2", "", *(f"{rule['within_factor_2']} of {rule['known']}" for rule in rules.values())]
    )
    return f"{text}\n\n{text_table(['method', 'best rate', *rules], rows)}"


if __name__ == "__main__":
    main()
