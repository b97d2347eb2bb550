"""Tasks of lm-evaluation-harness itself, on real questions, from a folder that has the name of the data on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pyarrow import parquet

from evatune.cli.main import main
from evatune.models import load_model, load_tokenizer

pytestmark = pytest.mark.slow

LIMIT = 12
TASKS = {"arc_easy": ("allenai/ai2_arc", "ARC-Easy"), "openbookqa": ("allenai/openbookqa", "main")}
ROWS = {"arc_easy": "ai2_arc/ARC-Easy", "openbookqa": "openbookqa/main"}
ASKED = {
    "arc_easy": lambda row: f"Question: {row['question']}\nAnswer:",
    "openbookqa": lambda row: row["question_stem"],
}


@pytest.fixture
def beside_the_data(original_data, tmp_path, monkeypatch) -> Path:
    """A folder to work in, with the data sets below it; `datasets` looks there before it asks the hub."""
    for task, (name, config) in TASKS.items():
        with pyarrow.memory_map(
            str(next((original_data / "hf_datasets" / ROWS[task] / "validation").glob("*.arrow")))
        ) as file:
            rows = pyarrow.ipc.open_stream(file).read_all()
        (tmp_path / name).mkdir(parents=True)
        parquet.write_table(rows.slice(0, 40), tmp_path / name / "rows.parquet")
        files = [{"split": split, "path": "rows.parquet"} for split in ("train", "validation", "test")]
        card = {"configs": [{"config_name": config, "data_files": files}]}
        (tmp_path / name / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def adapter(tiny_model, tmp_path) -> Path:
    """An adapter that changes answers."""
    torch.manual_seed(0)
    adapted = get_peft_model(
        load_model(tiny_model), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.mul_(5)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def likelihoods(model, tokenizer, *, prompt: str, choices: list[str]) -> list[float]:
    """The log-likelihood of each choice, one by one."""
    found = []
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for choice in choices:
        ids = tokenizer(f"{prompt} {choice}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(float(scores[place - 1, ids[place]]) for place in range(len(start), len(ids))))
    return found


def scored(*arguments: object, folder: Path, capsys) -> dict:
    """Score with the command line, and return what it saved."""
    words = [*map(str, arguments), "--precision", "fp32", "--harness", "lm-eval", "--tasks", *TASKS]
    assert main(["evaluate", *words, "--limit", str(LIMIT), "--save", str(folder / "scores.json"), "--overwrite"]) == 0
    said = capsys.readouterr().out
    assert all(task in said for task in TASKS)
    return json.loads((folder / "scores.json").read_text())


def test_stock_tasks_score_an_adapter_and_a_merged_model(beside_the_data, adapter, tiny_model, capsys):
    found = scored("--model", tiny_model, "--adapter", adapter, folder=beside_the_data, capsys=capsys)
    model, tokenizer = PeftModel.from_pretrained(load_model(tiny_model), adapter).eval(), load_tokenizer(tiny_model)
    for task, asked in ASKED.items():
        samples = found["samples"][task]
        assert len(samples) == LIMIT
        right = []
        for sample in samples:
            row = sample["doc"]
            expected = likelihoods(model, tokenizer, prompt=asked(row), choices=row["choices"]["text"])
            assert [value for value, _ in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-3)
            right.append(expected.index(max(expected)) == row["choices"]["label"].index(row["answerKey"]))
        assert found["results"][task]["acc,none"] == pytest.approx(sum(right) / LIMIT)
    merged = beside_the_data / "merged"
    shutil.copytree(tiny_model, merged)
    model.merge_and_unload().save_pretrained(merged)
    again = scored("--model", merged, folder=beside_the_data, capsys=capsys)
    for task in TASKS:
        for one, other in zip(found["samples"][task], again["samples"][task], strict=True):
            values = [[value for value, _ in sample["filtered_resps"]] for sample in (one, other)]
            assert values[0] == pytest.approx(values[1], abs=1e-3)
    plain = scored("--model", tiny_model, folder=beside_the_data, capsys=capsys)
    assert plain["samples"]["arc_easy"][0]["filtered_resps"] != found["samples"]["arc_easy"][0]["filtered_resps"]
