from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from evatune.errors import EvaError
from evatune.exhibits import adapters
from evatune.exhibits.view import View

NAME = "base_model.model.layers.0.q.lora_{}.weight"


@pytest.fixture
def kept(results):
    """Adapters whose trained A is the number of the seed everywhere; those of `eva ρ=1` are saved converted."""
    folder = results({"sst2": "accuracy"}, refused="")
    path = folder / "records.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in records:
        n_extra = 2 if record["method"] == "eva ρ=1" else 0
        rank = 6 if record["method"] == "pissa" else 2
        start = torch.ones(rank, 5)
        trained = torch.cat([start * (1 + record["seed"]), torch.zeros(n_extra, 5)])
        if record["method"] in ("lora", "eva ρ=1", "pissa"):
            for part, matrix in (("initial_adapter", start), ("adapter", trained)):
                target = folder / "runs" / record["name"] / part
                target.mkdir(parents=True)
                tensors = {NAME.format("A"): matrix, NAME.format("B"): torch.ones(3, len(matrix))}
                save_file(tensors, target / "adapter_model.safetensors")
    return folder, records


def cells(table) -> dict[str, object]:
    return {str(row[0]): row[1] and row[1].value for row in table.rows}


def test_adapters_of_one_seed_are_compared_in_whatever_order_they_finished(kept):
    folder, records = kept
    lora = [one for one in records if one["method"] == "lora"]
    order = [one for one in records if one["method"] != "lora"] + [lora[2], lora[1]]
    (folder / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in order))
    found = cells(adapters.apart(View(folders=(str(folder),))))
    assert found == {"eva ρ=1": "1.00 / 0", "pissa": None}  # another rank has no distance
    moved = cells(adapters.moved(View(folders=(str(folder),))))
    assert moved["eva ρ=1"] == f"1.00 / {10**0.5:.3g}" and moved["pissa"] == f"1.00 / {30**0.5:.3g}"
    assert adapters.updates(View(folders=(str(folder),))) is not None


def test_a_reference_without_adapters_or_anything_to_compare_is_told(kept):
    folder, _ = kept
    with pytest.raises(
        EvaError, match="eva ρ=2 kept no adapters on sst2; name one of lora, eva ρ=1, pissa with --against"
    ):
        adapters.apart(View(folders=(str(folder),), against="eva ρ=2"))
    with pytest.raises(EvaError, match="no other method shares a seed and ranks with pissa on sst2"):
        adapters.apart(View(folders=(str(folder),), against="pissa"))
