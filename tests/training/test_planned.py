"""A plan that was made before decides the ranks of a run, or of an adapter for a trainer of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from evatune.adapters.fit import check_has_no_others
from evatune.allocation import RankPlan
from evatune.errors import EvaError
from evatune.files import write_json
from evatune.spectra import Spectra
from evatune.training import finetune
from evatune.training.initial import write_initial_adapter


@pytest.fixture
def small(recipe):
    """Return a function that builds a recipe for one step."""

    def build(name, **adapter):
        return recipe(name, data={"eval": [], "max_length": 64}, measure={"max_batches": 2}, adapter=adapter)

    return build


def same(one, other):
    first, second = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_plan_gives_the_adapter_that_its_own_settings_would(small, tmp_path):
    """Whatever rank, rho, metric and budget the recipe says."""
    settings = {"rank": 3, "rho": 1.5, "metric": "max", "budget": "parameters", "lora_alpha": 2.0}
    made = write_initial_adapter(small("made", **settings))
    again = write_initial_adapter(small("again", plan=str(made.folder / "plan.json")))
    assert same(made.folder, again.folder)
    one, two = (PeftConfig.from_pretrained(each.folder) for each in (made, again))
    assert one.alpha_pattern == two.alpha_pattern
    assert again.plan == made.plan


def test_finetune_takes_a_plan_and_its_own_ranks_as_they_were_changed_by_hand(small, recipe):
    made = write_initial_adapter(small("made"))
    content = json.loads((made.folder / "plan.json").read_text())
    first, second = list(content["ranks"])[:2]
    content["ranks"] |= {first: 11, second: 0}  # 11 are more than rho 2 allows at rank 4
    path = write_json(made.folder.parent / "edited.json", content)

    wanted = recipe(
        data={"eval": [], "max_length": 64},
        measure={"max_batches": 2},
        adapter={"plan": str(path), "method": "lora-redist", "rank": 16},
        train={"steps": 1},
    )
    record = finetune(wanted, progress=False)
    folder = Path(wanted.output)
    assert json.loads((folder / "plan.json").read_text())["ranks"] == content["ranks"]
    assert Spectra.load(folder / "spectra")[first].components.shape[0] == 11
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert weights[f"base_model.model.{first}.lora_A.weight"].shape[0] == 11
    assert not any(second in name for name in weights)
    assert (record.recipe["adapter"]["rank"], record.parameters["without_adapter"]) == (4, 1)
    assert finetune(wanted, resume=True, progress=False) == record


def test_what_is_no_plan_or_another_models_is_refused_before_anything_is_measured(small, tmp_path, monkeypatch):
    monkeypatch.setattr("evatune.training.setup.measure", lambda *args, **kwargs: pytest.fail("measured"))
    with pytest.raises(EvaError, match=r"there is no plan .*none\.json; `evatune plan"):
        write_initial_adapter(small("new", plan="none.json"))
    path = tmp_path / "plan.json"
    for text, why in (("[1]", "holds a list"), ("{", "Expecting"), ('{"ranks": {}}', "the entry 'alphas' is missing")):
        path.write_text(text)
        with pytest.raises(EvaError, match=rf"plan\.json: .*{why}"):
            write_initial_adapter(small("new", plan=str(path)))
    of_another = {"ranks": {"layers.7.q": 3}, "alphas": {"layers.7.q": 1.0}, "base_ranks": {"layers.7.q": 3}}
    of_another |= {"in_features": {"layers.7.q": 9}, "out_features": {"layers.7.q": 9}}
    write_json(path, of_another | {"explained": {}, "rho": 2.0, "metric": "ratio"})
    with pytest.raises(EvaError, match=r"plan\.json has layers that the adapter has not \(1, the first 'layers"):
        write_initial_adapter(small("new", plan=str(path)))
    assert not (tmp_path / "new").exists()


def test_a_method_without_redistribution_takes_no_plan(small):
    with pytest.raises(EvaError, match=r"adapter\.method: method 'lora' takes no plan made before; .* take eva, "):
        small("new", plan="plan.json", method="lora")
    with pytest.raises(EvaError, match="method 'eva-grad' takes no plan"):
        small("new", plan="plan.json", method="eva-grad")


def test_the_plan_of_another_scale_is_refused(small):
    made = write_initial_adapter(small("made"))
    with pytest.raises(EvaError, match=r"alphas are for use_rslora=False, the adapter has use_rslora=True"):
        write_initial_adapter(small("new", plan=str(made.folder / "plan.json"), method="eva+rslora"))


def test_a_plan_with_more_components_than_were_kept_is_refused(small, recipe, tmp_path):
    made = write_initial_adapter(small("made"))
    finetune(recipe("run", data={"eval": [], "max_length": 64}, train={"steps": 1}), progress=False)
    spectra = str(tmp_path / "run" / "spectra")  # 8 components of each input
    content = json.loads((made.folder / "plan.json").read_text())
    first = next(iter(content["ranks"]))
    for rank in (8, 9):
        path = str(write_json(tmp_path / f"{rank}.json", content | {"ranks": content["ranks"] | {first: rank}}))
        wanted = recipe(f"of {rank}", measure={"spectra": spectra}, adapter={"plan": path})
        if rank == 8:
            assert write_initial_adapter(wanted).plan.ranks[first] == 8
        else:
            with pytest.raises(EvaError, match=rf"'{first}' rank 9, but 8 components were kept of its input; measure"):
                write_initial_adapter(wanted)


def test_a_plan_with_layers_that_the_adapter_has_not_is_refused():
    unknown = {"alphas": {}, "base_ranks": {}, "explained": {}, "in_features": {}, "out_features": {}}
    plan = RankPlan(ranks={"q": 2, "layers.7.q": 3}, rho=2.0, metric="ratio", **unknown)
    with pytest.raises(EvaError, match=r"the plan has layers that the adapter has not \(1, the first 'layers\.7\.q'\)"):
        check_has_no_others(plan, {"q", "k"})
    check_has_no_others(plan, {"q", "k", "layers.7.q"})


def test_a_plan_that_lacks_layers_of_the_adapter_is_refused(small):
    made = write_initial_adapter(small("made", target_modules=["q_proj"]))
    with pytest.raises(EvaError, match=r"the plan lacks layers of the adapter \(\d+, the first '.*'\)"):
        write_initial_adapter(small("new", plan=str(made.folder / "plan.json")))
