"""`dry_run`: what a recipe asks for, without weights, without a hub and without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from evatune.activations import estimate
from evatune.activations.layers.targets import TargetModule
from evatune.adapters.four_bits import quantized_bytes
from evatune.adapters.prepare import adapter_shapes
from evatune.errors import EvaError
from evatune.recipe import Recipe
from evatune.settings import Preparing
from evatune.tables import byte_size, duration
from evatune.tasks import find_domain
from evatune.tasks.outline import Outline
from evatune.tasks.task import Task
from evatune.training.accelerators import Accelerator
from evatune.training.arguments import check_shares, total_steps
from evatune.training.setup import (
    checkpoint_gradients,
    measures,
    open_recipe,
    planned,
    uses_bf16,
    without_adapter,
)
from evatune.training.step_cost import step_cost


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Estimated bytes of one process while it trains, with uniform ranks and no padding."""

    weights: int
    """All weights, those of the adapter included."""
    optimizer: int
    """AdamW's two moments of what is trained."""
    step: int
    """What a step needs beside these at its peak: activations, gradients, copies."""

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.optimizer + self.step


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a recipe asks for."""

    task: str
    """What the run learns."""
    method: str
    """How the adapter starts."""
    columns: str
    """What a row of the data must have."""
    n_examples: int | None
    """Training examples."""
    examples_a_step: int
    """Examples in one optimizer step of all processes."""
    steps: int | None
    """Optimizer steps; None where the examples could not be counted."""
    model: str | None = None
    """Class of the model."""
    n_parameters: int | None = None
    """Parameters of the base model."""
    n_targets: int | None = None
    """Modules that get an adapter."""
    n_trainable: int | None = None
    """Trainable parameters, heads included; with uniform ranks."""
    bf16: bool = False
    """Whether a step computes in bfloat16."""
    sample: str = ""
    """What one example of the step is."""
    memory: Memory | None = None
    """Estimated memory."""
    measuring: int | None = None
    """Upper bound of the bytes of what is measured (EVA), beside weights and the activations of a forward pass; known
    for text."""
    flops_a_step: int | None = None
    """Operations of the matrix products of one optimizer step in one process."""
    processes: int = 1
    """Processes that share the examples of a step."""
    accelerator: Accelerator | None = None
    """The card that each process has."""
    unchecked: tuple[str, ...] = ()
    """What could not be checked."""

    @property
    def fits(self) -> bool | None:
        """Whether the estimated memory is at most that of the card."""
        if self.memory is None or self.accelerator is None:
            return None
        return self.memory.total <= self.accelerator.memory_bytes

    @property
    def least_seconds(self) -> float | None:
        """Seconds below which training cannot end on the card, at its peak rate; real runs take longer."""
        if self.accelerator is None or not self.flops_a_step or self.steps is None or not self.bf16:
            return None
        return self.steps * self.flops_a_step / (self.accelerator.bf16_teraflops * 1e12)

    def text(self) -> str:
        """Return everything as lines for a terminal."""
        lines = [("recipe", f"no mistake found: task {self.task}, method {self.method}"), ("data", self.columns)]
        lines.append(("steps", self._steps()))
        if self.model is not None:
            assert self.n_trainable is not None and self.n_parameters
            on = f"{self.n_targets} targets, " if self.n_targets else ""
            share = self.n_trainable / self.n_parameters
            lines.append(("model", f"{self.model}, {self.n_parameters:,} parameters"))
            lines.append(("trained", f"{on}{self.n_trainable:,} parameters ({share:.2%}) if ranks are uniform"))
        if (memory := self.memory) is not None:
            each_of = "one process" if self.processes == 1 else f"each of {self.processes} processes"
            precision = "bf16" if self.bf16 else "fp32"
            lines.append(("memory", f"estimated for {each_of} and {self.sample} in {precision}:"))
            parts = {"weights": memory.weights, "AdamW": memory.optimizer, "a step": memory.step}
            each = " + ".join(f"{name} {byte_size(size)}" for name, size in parts.items())
            lines.append(("", f"{each} = {byte_size(memory.total)}"))
        if self.measuring is not None:
            lines.append(("", f"while measuring, instead of AdamW: states of at most {byte_size(self.measuring)}"))
        lines += self._on_card()
        lines += [("unchecked", note) for note in self.unchecked]
        return "\n".join(f"{title:<9} {text}" for title, text in lines)

    def to_json(self) -> dict[str, Any]:
        """Return everything, for programs."""
        content = dataclasses.asdict(self)
        if self.memory is not None:
            content["memory"]["total"] = self.memory.total
        return content | {"fits": self.fits, "least_seconds": self.least_seconds}

    def _steps(self) -> str:
        if self.steps is None:
            return f"unknown number of steps of {self.examples_a_step} examples"
        of = "" if self.n_examples is None else f", from {self.n_examples:,} examples"
        return f"{self.steps:,} steps of {self.examples_a_step} examples{of}"

    def _on_card(self) -> list[tuple[str, str]]:
        card, memory = self.accelerator, self.memory
        if card is None or memory is None:
            return []
        hint = "" if self.fits else "; gradient_checkpointing or a smaller train.batch_size needs less"
        verb = "fits" if self.fits else "does not fit"
        lines = [("", f"{verb} on {card.name}, which has {byte_size(card.memory_bytes)}{hint}")]
        if (least := self.least_seconds) is not None:
            each, peak = (self.flops_a_step or 0) / 1e12, card.bf16_teraflops
            why = f"{each:,.3g} teraflop a step, at most {peak:g} a second"
            lines.append(("time", f"more than {duration(least)}: {why}"))
        return lines


def dry_run(recipe: Recipe, *, accelerator: Accelerator | None = None, processes: int = 1) -> DryRun:
    """Check a recipe and tell what it asks for. Nothing is trained, no weight is loaded and no hub is asked.

    Data on this machine are read, to look at their columns and to count them.

    Args:
        recipe: only its model must be given.
        accelerator: the card of each process; without it, precision `auto` is what this machine would take.
        processes: how many of them share `train.batch_size`.

    Raises:
        EvaError: the recipe, its data or its model has a mistake that would end a run.
    """
    recipe.require("model")
    recipe, _ = planned(recipe)
    settings = recipe.train
    if processes < 1:
        raise EvaError(f"processes is {processes}, but must be at least 1.")
    check_shares(settings, n_processes=processes)
    task = open_recipe(recipe, offline=True)
    outline = task.outline()
    steps = None
    if settings.steps is not None or outline.n_examples is not None:
        steps = total_steps(settings, n_examples=outline.n_examples or 0)
    told = DryRun(
        task=recipe.task,
        method=recipe.adapter.method,
        columns=outline.columns,
        n_examples=outline.n_examples,
        examples_a_step=settings.batch_size * settings.gradient_accumulation,
        steps=steps,
        accelerator=accelerator,
        processes=processes,
        unchecked=outline.unchecked,
    )
    return told if outline.build is None else _with_model(told, recipe, task, outline)


def _with_model(told: DryRun, recipe: Recipe, task: Task, outline: Outline) -> DryRun:
    """Add what the shape of the model tells."""
    assert outline.build is not None
    settings, adapter = recipe.train, recipe.adapter
    on_card = told.accelerator is not None and settings.precision == "auto"
    bf16 = on_card or uses_bf16(settings)
    with torch.device("meta"):
        base: Any = outline.build()
    needs = task.needs(base)
    n_parameters = sum(parameter.numel() for parameter in base.parameters())
    kind = type(base).__name__
    measuring = _measuring(recipe, base, without=without_adapter(recipe, needs))
    options = adapter.shared(Preparing) | {"exclude_modules": without_adapter(recipe, needs), "seed": settings.seed}
    model, targets = adapter_shapes(
        base,
        total_steps=told.steps or 1000,  # only a schedule depends on it
        modules_to_save=needs.heads or None,
        task_type=needs.task_type,
        **options,
    )
    examples = settings.batch_size // told.processes
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    told = dataclasses.replace(
        told,
        model=kind,
        n_parameters=n_parameters,
        n_targets=len(targets),
        n_trainable=sum(parameter.numel() for parameter in trained),
        bf16=bf16,
        measuring=measuring,
        sample=f"{examples} x {outline.sample}",
    )
    weights, unpacked = _held(model, targets if adapter.choice.in_four_bits else [])
    try:
        cost = step_cost(
            model,
            partial(outline.batch, examples),
            bf16=bf16,
            checkpoint=checkpoint_gradients if settings.gradient_checkpointing else None,
        )
    except Exception as error:  # a model can fail in any way if values are missing
        reason = str(error).strip().split("\n")[0][:100]
        note = f"{kind} cannot be followed without values, so the memory of a step is unknown ({reason})"
        return dataclasses.replace(told, unchecked=(*told.unchecked, note))
    gradients = sum(parameter.nbytes for parameter in trained)
    kept = gradients if settings.gradient_accumulation > 1 else 0
    memory = Memory(weights=weights, optimizer=2 * gradients, step=cost.peak_bytes + kept + unpacked)
    return dataclasses.replace(told, memory=memory, flops_a_step=cost.flops * settings.gradient_accumulation)


def _held(model: Any, in_four_bits: Sequence[TargetModule]) -> tuple[int, int]:
    """Return the bytes of all weights as they are held, and those of the largest one that a step unpacks."""
    packed: list[Any] = [target.module.weight for target in in_four_bits]
    saved = sum(weight.nbytes - quantized_bytes(weight.numel()) for weight in packed)
    held = sum(parameter.nbytes for parameter in model.parameters()) - saved
    return held, max((weight.nbytes for weight in packed), default=0)


def _measuring(recipe: Recipe, model: Any, *, without: Any) -> int | None:
    """Return the bound of the bytes that the measurement of a text model keeps, where the recipe measures."""
    if find_domain(recipe.task).head is None or not measures(recipe) or recipe.measure.spectra:
        return None
    told = estimate(
        model,
        batch_size=recipe.measure.batch_size,
        length=cast(Any, recipe.data).max_length,
        settings=dataclasses.replace(recipe.measuring, exclude_modules=without),
    )
    return told.state_bytes + told.cached_bytes
