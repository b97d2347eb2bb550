"""The README of an adapter is no empty card."""

from __future__ import annotations

from evatune.recipe import Recipe
from evatune.training import finetune


def test_the_readme_says_what_the_adapter_is_and_how_it_was_made(tiny_model, tiny_data, tmp_path):
    recipe = Recipe.from_dict(
        {
            "model": str(tiny_model),
            "data": {"train": [str(tiny_data / "train.jsonl")], "eval": [str(tiny_data / "test.jsonl")]},
            "adapter": {"rank": 2},
            "measure": {"max_batches": 2},
            "train": {"steps": 1, "batch_size": 4},
            "output": str(tmp_path / "run"),
        }
    )
    finetune(recipe, progress=False)
    text = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert text.startswith(f"---\nbase_model: {tiny_model}\nlibrary_name: peft\ntags: [lora, eva]\n")
    assert "Method: `eva`, rank 2 on average over 14 modules, alpha 1" in text
    assert "Trained for 1 steps of 4 examples" in text
    assert "- after training: loss " in text
    assert "PeftModel.from_pretrained" in text
    assert "More Information Needed" not in text
