"""The README of an adapter: what it is, how it was made, how to load it."""

from __future__ import annotations

from collections.abc import Sequence

from evatune.recipe import Recipe
from evatune.tasks import find_domain
from evatune.tasks.scores import score_line
from evatune.training.record import RunRecord


def adapter_card(recipe: Recipe, record: RunRecord) -> str:
    """Return a README in Markdown, with the front matter that model hubs read.

    Args:
        recipe: of the run.
        record: of the run.
    """
    train, counts = recipe.train, record.parameters
    scores = [f"- {when} training: {score_line(found)}" for when, found in _scores(record) if found]
    return "\n".join(
        [
            *_head(recipe, title=f"Adapter for {recipe.model.name}"),
            f"{_made(recipe, n_targets=counts['targets'])}; {counts['trainable']:,} trained parameters beside "
            f"{counts['base']:,} of the model.",
            "",
            f"Trained for {record.steps} steps of {train.batch_size * train.gradient_accumulation} examples, learning "
            f"rate {train.learning_rate:g} ({train.schedule}), {record.precision}, seed {train.seed}, with evatune "
            f"{record.versions['evatune']}. `recipe.yaml` and `run.json` beside this folder say everything else.",
            "",
            *scores,
            "",
            *_loading(),
        ]
    )


def initial_card(recipe: Recipe, *, n_targets: int, notes: Sequence[str] = ()) -> str:
    """Return the README of an adapter that was initialized and is not trained yet.

    Args:
        recipe: what it was made by.
        n_targets: targets of the model.
        notes: what a trainer must do besides loading it.
    """
    return "\n".join(
        [
            *_head(recipe, title=f"Start of an adapter for {recipe.model.name}"),
            f"{_made(recipe, n_targets=n_targets)}. It is initialized and not trained yet.",
            "",
            *_loading(", is_trainable=True"),
            *[f"- {note}" for note in notes],
            *([""] if notes else []),
        ]
    )


def _head(recipe: Recipe, *, title: str) -> list[str]:
    method = recipe.adapter.choice.method
    tags = ", ".join(dict.fromkeys([*(["lora"] if method.is_lora else []), method.name]))
    front = [f"base_model: {recipe.model.name}", "library_name: peft", f"tags: [{tags}]"]
    return ["---", *front, "---", "", f"# {title}", ""]


def _made(recipe: Recipe, *, n_targets: int) -> str:
    settings = recipe.adapter
    return (
        f"Task: {recipe.task} ({find_domain(recipe.task).idea}). Method: `{settings.method}`, rank {settings.rank} on "
        f"average over {n_targets} modules, alpha {settings.lora_alpha:g}"
    )


def _loading(options: str = "") -> list[str]:
    call = f'model = PeftModel.from_pretrained(base_model, "this/folder"{options})'
    return ["```python", "from peft import PeftModel", "", call, "```", ""]


def _scores(record: RunRecord) -> list[tuple[str, dict | None]]:
    return [("before", record.before), ("after", record.after)]
