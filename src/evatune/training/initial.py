"""From a recipe to the folder of an initialized PEFT adapter, for a trainer of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evatune import launch
from evatune.adapters.attach import save_adapter
from evatune.adapters.counting import count_adapter
from evatune.allocation import RankPlan
from evatune.errors import EvaError
from evatune.files import check_writable, write_json, write_text
from evatune.methods import Method
from evatune.recipe import Recipe
from evatune.spectra import Spectra
from evatune.training.card import initial_card
from evatune.training.folder import PLAN
from evatune.training.setup import (
    is_interrupted,
    load_base,
    measure_recipe,
    measures,
    new_adapter,
    open_recipe,
    planned,
    quantize_as_asked,
    use_threads,
)


@dataclass(frozen=True, kw_only=True)
class InitialAdapter:
    """An adapter that was initialized and saved."""

    folder: Path
    """What `PeftModel.from_pretrained` loads."""
    method: str
    """The method with its options, as in the recipe."""
    rank: int
    """The recipe's rank."""
    plan: RankPlan | None
    """The rank of each target; None if all have the recipe's."""
    n_targets: int
    """Targets, those without rank included."""
    n_trainable: int
    """Trainable parameters, heads included."""
    notes: list[str]
    """What a trainer must do besides loading the folder, since the folder of an adapter cannot store it."""

    def text(self) -> str:
        """Return the plan as a table; for uniform ranks, one line with rank and counts."""
        if self.plan is not None:
            return self.plan.table()
        return f"{self.method}: rank {self.rank} on {self.n_targets} targets, {self.n_trainable:,} trainable parameters"

    def to_json(self) -> dict[str, Any]:
        """Return folder, plan, count and notes, for programs."""
        return {
            "output": str(self.folder),
            "plan": self.plan.to_json() if self.plan is not None else {},
            "trainable_parameters": self.n_trainable,
            "notes": self.notes,
        }


def write_initial_adapter(
    recipe: Recipe, *, overwrite: bool = False, force: bool = False, say: Callable[[str], None] | None = None
) -> InitialAdapter:
    """Initialize an adapter as a recipe says, and save it with its plan.

    Args:
        recipe: model and output must be given, and data where the method looks at data and no spectra are given.
        overwrite: replace an output folder that holds an adapter.
        force: take spectra that were measured on another model.
        say: gets each line of the report on what is done.

    Raises:
        EvaError: the method changes base weights or its adapter is not LoRA, or something is wrong with the recipe,
            the model, the data, the spectra or the output folder; nothing is written then.
        KeyboardInterrupt: Ctrl-C while measuring; nothing is written.
    """
    method, given = recipe.adapter.choice.method, recipe.measure.spectra
    if reason := _why_not(method):
        raise EvaError(
            f"init cannot write a start of method {recipe.adapter.method!r} for a trainer of your own, since "
            f"{reason}; call evatune.prepare in your script, or use `evatune finetune`."
        )
    needs_data = method.needs_batches and (method.needs_gradients or not given)
    recipe.require("model", "output", *(("data",) if needs_data else ()))
    recipe, given_plan = planned(recipe)
    check_writable(recipe.output, overwrite=overwrite, holds="adapter_config.json")
    use_threads(recipe)
    spectra = Spectra.load(given) if given and measures(recipe) else None
    task = open_recipe(recipe)
    if needs_data and say:
        say(f"data      {task.summary()}")
    model = load_base(recipe, task, quantizes=True)
    quantize_as_asked(recipe, model, task.needs(model))
    if spectra is None and measures(recipe):
        spectra = measure_recipe(recipe, model, task=task, plan=given_plan)
        if is_interrupted(spectra):
            raise KeyboardInterrupt
    adapted, plan = new_adapter(recipe, model, spectra, task=task, plan=given_plan, force=force)
    launch.wait()  # all have found that the folder may be written
    folder = Path(recipe.output)
    counts, notes = count_adapter(adapted, plan), _notes(recipe)
    if launch.is_first():
        save_adapter(adapted, folder, overwrite=overwrite)
        if plan is not None:
            write_json(folder / PLAN, plan.to_json(), indent=2)
        write_text(folder / "README.md", initial_card(recipe, n_targets=counts["targets"], notes=notes))
    return InitialAdapter(
        folder=folder,
        method=recipe.adapter.method,
        rank=recipe.adapter.rank,
        plan=plan,
        n_targets=counts["targets"],
        n_trainable=counts["trainable"],
        notes=notes,
    )


def _why_not(method: Method) -> str | None:
    """Return why no folder of an adapter holds the whole start of a method; None if it does."""
    if method.changes_base:
        return "it changes the base weights"
    if not method.has_adapter:
        return "it trains the model itself and has no adapter"
    return None if method.is_lora else "its adapter is not LoRA"


def _notes(recipe: Recipe) -> list[str]:
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
