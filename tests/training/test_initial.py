"""An initialized adapter for a trainer of one's own, from a recipe by one call."""

from __future__ import annotations

import json

import pytest

from evatune.errors import EvaError
from evatune.recipe import Recipe
from evatune.training.initial import write_initial_adapter


@pytest.fixture
def recipe(tiny_model, tiny_data, tmp_path):
    """Return a function that makes a recipe with some settings of the adapter."""

    def make(**adapter: object) -> Recipe:
        return Recipe.from_dict(
            {
                "model": str(tiny_model),
                "data": {"train": [str(tiny_data / "train.jsonl")]},
                "adapter": {"rank": 2} | adapter,
                "measure": {"max_batches": 2},
                "output": str(tmp_path / "adapter"),
            }
        )

    return make


def test_the_value_says_what_the_folder_holds(recipe, tmp_path):
    lines: list[str] = []
    made = write_initial_adapter(recipe(method="eva", train_a=False), say=lines.append)
    assert made.folder == tmp_path / "adapter" and made.plan is not None
    assert json.loads((made.folder / "plan.json").read_text()) == made.plan.to_json() == made.to_json()["plan"]
    assert (made.n_targets, made.n_trainable) == (14, made.plan.n_parameters)
    assert made.text() == made.plan.table()
    assert [note.partition(",")[0] for note in made.notes] == ["to train B alone"]
    assert [line.split()[0] for line in lines] == ["data"]


def test_an_error_leaves_the_folder_as_it_was(recipe, tmp_path):
    with pytest.raises(EvaError, match="'pissa' for a trainer of your own, since it changes the base weights"):
        write_initial_adapter(recipe(method="pissa"))
    assert not (tmp_path / "adapter").exists()
    made = write_initial_adapter(recipe(method="lora"))
    assert made.to_json() == {
        "output": str(made.folder),
        "plan": {},
        "trainable_parameters": made.n_trainable,
        "notes": [],
    }
    before = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    with pytest.raises(EvaError, match="exists"):
        write_initial_adapter(recipe(method="rslora"))
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == before


def test_its_readme_says_what_it_is_and_how_to_go_on(recipe):
    made = write_initial_adapter(recipe(method="eva+lora+"))
    text = (made.folder / "README.md").read_text()
    assert "# Start of an adapter for " in text and "It is initialized and not trained yet." in text
    assert "Method: `eva+lora+`, rank 2 on average over 14 modules" in text
    assert 'from_pretrained(base_model, "this/folder", is_trainable=True)' in text
    assert "- lora+ is the optimizer's: give your trainer" in text
