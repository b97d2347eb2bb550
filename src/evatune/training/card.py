"""The README of a trained adapter: what it is, how it was made, how to load it."""

from __future__ import annotations

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
    settings, train, counts = recipe.adapter, recipe.train, record.parameters
    scores = [f"- {when} training: {score_line(found)}" for when, found in _scores(record) if found]
    return "\n".join(
        [
            "---",
            f"base_model: {recipe.model.name}",
            "library_name: peft",
            "tags: [lora, eva]" if settings.method.startswith("eva") else "tags: [lora]",
            "---",
            "",
            f"# Adapter for {recipe.model.name}",
            "",
            f"Task: {recipe.task} ({find_domain(recipe.task).idea}). Method: `{settings.method}`, rank {settings.rank} "
            f"on average over {counts['targets']} modules, alpha {settings.lora_alpha:g}; "
            f"{counts['trainable']:,} trained parameters beside {counts['base']:,} of the model.",
            "",
            f"Trained for {record.steps} steps of {train.batch_size * train.gradient_accumulation} examples, learning "
            f"rate {train.learning_rate:g} ({train.schedule}), {record.precision}, seed {train.seed}, with evatune "
            f"{record.versions['evatune']}. `recipe.yaml` and `run.json` beside this folder say everything else.",
            "",
            *scores,
            "",
            "```python",
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base_model, "this/folder")',
            "```",
            "",
        ]
    )


def _scores(record: RunRecord) -> list[tuple[str, dict | None]]:
    return [("before", record.before), ("after", record.after)]
