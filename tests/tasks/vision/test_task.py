"""Pictures in, a classifier out: a whole run, its record, its adapter, its preview."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tests.on_device import TRAINED_BY_TRAINER

from evatune.cli.main import main
from evatune.errors import EvaError
from evatune.recipe import Recipe
from evatune.tasks import open_task
from evatune.tasks.settings import ModelSettings
from evatune.tasks.task import batches
from evatune.tasks.vision.classify import Classifier
from evatune.tasks.vision.model import load_classifier
from evatune.tasks.vision.settings import VisionData
from evatune.training import finetune
from evatune.training.callbacks import InterruptCallback
from evatune.training.evaluation import evaluate, saved_run
from evatune.training.setup import load_base, measure_recipe, open_recipe


@pytest.fixture
def recipe(tiny_vit: Path, photos: Path, tmp_path: Path):
    """Return a function that builds a small recipe; settings are given as `section={...}`."""

    def build(name: str = "run", **sections: dict[str, Any]) -> Recipe:
        content: dict[str, Any] = {
            "task": "vision",
            "model": {"name": str(tiny_vit)},
            "data": {"train": [str(photos)], "image_size": 28},
            "adapter": {"rank": 4},
            "measure": {"max_batches": 3, "batch_size": 8},
            "train": {"steps": 20, "batch_size": 8, "precision": "fp32", "learning_rate": 2e-2},
            "output": str(tmp_path / name),
        }
        for section, values in sections.items():
            content[section] = content[section] | values
        return Recipe.from_dict(content)

    return build


def open_photos(photos: Path, tiny_vit: Path, **settings: Any):
    data = VisionData(train=str(photos), image_size=28, **settings)
    return open_task("vision", data, model=ModelSettings(name=str(tiny_vit)), seed=0)


@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_a_folder_of_photos_becomes_a_classifier(recipe, tiny_vit):
    wanted = recipe()
    record = finetune(wanted, progress=False)
    folder = Path(wanted.output)

    assert record.before["metrics"]["accuracy"] <= 0.75
    assert record.after["metrics"]["accuracy"] == 1.0
    assert record.data["classes"] == {"blue": 16, "red": 16}
    assert record.data["measured_tokens"] == "all"
    outcomes = json.loads((folder / "after.json").read_text())["outcomes"]
    assert outcomes["right"] == [1.0] * 8
    assert outcomes["expected"] == outcomes["predicted"]

    # The head is trained whole, saved with the adapter, and has none itself; every linear layer has one.
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in weights
    assert not any("classifier" in name and "lora" in name for name in weights)
    adapted = {name.rpartition(".lora_A")[0] for name in weights if ".lora_A" in name}
    plan = json.loads((folder / "plan.json").read_text())
    assert len(plan["ranks"]) == 2 * 6  # query, key, value, output, two of the MLP
    assert len(adapted) == sum(rank > 0 for rank in plan["ranks"].values())


def test_the_adapter_loads_with_plain_peft_head_included(recipe, tiny_vit, photos):
    wanted = recipe()
    record = finetune(wanted, progress=False)
    torch.manual_seed(1)
    base = load_classifier(ModelSettings(name=str(tiny_vit)), n_classes=2, size=28)
    model = PeftModel.from_pretrained(base, str(Path(wanted.output) / "adapter"))
    scores = open_photos(photos, tiny_vit).evaluate(model, progress=False)
    assert scores.to_json()["metrics"] == pytest.approx(record.after["metrics"], rel=1e-5)


@pytest.mark.parametrize("method", ["eva", "full"])
@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_new_pictures_are_classified_in_the_same_classes(recipe, photos, tmp_path, method):
    wanted = recipe(
        adapter={"method": method}, data={"fit": "crop"}, train={"learning_rate": 2e-2 if method == "eva" else 1e-3}
    )
    finetune(wanted, progress=False)
    classifier = Classifier.load(Path(wanted.output) / ("model" if method == "full" else "adapter"))
    answers = classifier([photos / "red" / "00.png", str(photos / "blue" / "00.png")], batch_size=1)
    assert [next(iter(answer)) for answer in answers] == ["red", "blue"]
    assert [sum(answer.values()) for answer in answers] == pytest.approx([1.0, 1.0])
    assert classifier.preprocessing.fit == "crop"
    with pytest.raises(EvaError, match=r"nowhere\.png is not there\."):
        classifier(["nowhere.png"])
    with pytest.raises(EvaError, match=r"holds no trained image classifier: it has no classes\.json"):
        Classifier.load(wanted.output)

    (tmp_path / "others").mkdir()
    for old, new in (("blue", "blue"), ("red", "green")):
        (tmp_path / "others" / new).symlink_to(photos / old)
    other, adapter = saved_run(wanted.output, {"data.train": [str(tmp_path / "others")]})
    with pytest.raises(
        EvaError, match=r"trained for 2 classes \(blue, red\), but the data have 2 .*blue, green.*--eval"
    ):
        evaluate(other, adapter=adapter, progress=False)


def test_methods_and_seeds_begin_with_equal_heads(tiny_vit, photos):
    heads = []
    for _ in range(2):
        torch.manual_seed(5)
        heads.append(open_photos(photos, tiny_vit).load_model().classifier.weight)
    assert torch.equal(*heads)


@pytest.mark.parametrize(("kind", "n_tokens"), [("all", 9), ("patch", 4), ("class", 1), ("register", 4)])
def test_eva_measures_the_tokens_that_it_is_told_to(recipe, kind, n_tokens):
    whole = {"tau": None, "min_gain": None}  # all three batches
    wanted = recipe(data={"measure_tokens": kind}, adapter={"rank": 1, "rho": 1.0}, measure=whole)
    task = open_recipe(wanted)
    model = load_base(wanted, task)
    spectra = measure_recipe(wanted, model, task=task, progress=False)
    assert {spectrum.n_rows for spectrum in spectra.inputs.values()} == {3 * 8 * n_tokens}
    assert task.facts()["measured_tokens"] == kind

    # Against the tokens themselves, in float64; below the first block, class and registers do not vary yet.
    seen = []
    target = "backbone.encoder.layer.1.attention.q_proj"
    hook = model.get_submodule(target).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for _, batch in zip(range(3), batches(task, batch_size=8, seed=0), strict=False):
        model(pixel_values=batch["pixel_values"])
    hook.remove()
    part = {"all": slice(None), "class": slice(1), "register": slice(1, 5), "patch": slice(5, None)}[kind]
    rows = torch.cat([tokens[:, part].flatten(0, 1) for tokens in seen]).double()
    _, _, components = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert abs(float(spectra[target].components[0].double() @ components[0])) == pytest.approx(1, abs=1e-4)


def test_tokens_that_a_model_does_not_have_are_refused(recipe, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "plain")
    wanted = recipe(model={"name": str(tmp_path / "plain")}, data={"measure_tokens": "register"})
    with pytest.raises(EvaError, match=r"no register tokens that could be measured \(class and patch\)"):
        finetune(wanted, progress=False)
    assert not Path(wanted.output).exists()


@pytest.mark.parametrize("method", ["eva", "pissa", "vera"])
@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_biases_are_trained_and_saved_on_request(recipe, tiny_vit, photos, method):
    wanted = recipe(adapter={"method": method, "bias": "all"}, train={"steps": 4})
    record = finetune(wanted, progress=False)
    saved = Path(wanted.output) / "adapter"
    base = load_classifier(ModelSettings(name=str(tiny_vit)), n_classes=2, size=28)
    old = {name: tensor.clone() for name, tensor in base.named_parameters() if name.endswith(".bias")}
    new = load_file(saved / "adapter_model.safetensors")
    for name in old:
        stored = [key for key in new if key.replace(".base_layer", "").endswith(f"model.{name}")]
        assert stored, name
        assert any(not torch.equal(new[key], old[name]) for key in stored), name
    model = PeftModel.from_pretrained(base, str(saved))
    scores = open_photos(photos, tiny_vit).evaluate(model, progress=False)
    assert scores["loss"] == pytest.approx(record.after["metrics"]["loss"], rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "full", "eva+dora", "pissa"])
@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_other_methods_are_one_word_away(recipe, method):
    wanted = recipe(adapter={"method": method}, train={"steps": 2})
    record = finetune(wanted, progress=False)
    assert record.steps == 2
    saved = Path(wanted.output) / ("model" if method == "full" else "adapter")
    assert saved.is_dir()
    if method == "full":
        again = load_classifier(ModelSettings(name=str(saved)), n_classes=2, size=28)
        assert again.classifier.weight.abs().max() > 1e-3  # not a new head
        assert json.loads((saved / "classes.json").read_text()) == ["blue", "red"]


@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_full_fine_tuning_with_layer_wise_decay(recipe):
    """The first step of AdamW moves every weight by its learning rate, whatever the gradient."""
    train = {"steps": 1, "learning_rate": 1e-3, "layer_decay": 0.5, "schedule": "constant", "warmup_ratio": 0.0}
    wanted = recipe(adapter={"method": "full"}, train=train)
    finetune(wanted, progress=False)
    old = load_file(Path(wanted.model.name) / "model.safetensors")
    new = load_file(Path(wanted.output) / "model" / "model.safetensors")
    moved = {name: (new[name] - old[name]).abs().max().item() for name in old}
    assert moved["layernorm.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["encoder.layer.1.mlp.fc1.weight"] == pytest.approx(5e-4, rel=1e-2)
    assert moved["encoder.layer.0.mlp.fc1.weight"] == pytest.approx(2.5e-4, rel=1e-2)


def test_layer_decay_beside_lora_plus_is_refused(recipe):
    with pytest.raises(EvaError, match=r"train\.layer_decay is 0\.75, but lora\+ has rates of its own"):
        recipe(adapter={"method": "lora+lora+"}, train={"layer_decay": 0.75})


def test_scores_on_the_first_pictures_only(photos, tiny_vit):
    task = open_photos(photos, tiny_vit)
    model = task.load_model().train()
    scores = task.evaluate(model, limit=3, progress=False)
    assert scores.counts == {"pictures": 3, "skipped": 0}
    assert model.training


def test_preview_is_a_contact_sheet(photos, tiny_vit):
    preview = open_photos(photos, tiny_vit).preview(10)
    sheet = Image.open(io.BytesIO(preview.picture))
    assert sheet.size == (8 * 168 + 8, 2 * 190 + 8)
    names = [item["class"] for item in preview.content]
    assert set(names) == {"blue", "red"}
    # The first picture, in its place, has the colour of its class.
    red, _, blue = sheet.convert("RGB").getpixel((8 + 80, 8 + 80))
    assert (red > blue) == (names[0] == "red")
    assert len(preview.text.splitlines()) == 10
    assert "seen at 28 x 28" in preview.text


def test_photos_need_no_recipe(photos, tiny_vit, tmp_path, capsys):
    data = ["--task", "vision", "--model", str(tiny_vit), "--data", str(photos), "--image-size", "28"]
    short = ["--steps", "2", "--rank", "2", "--max-batches", "2", "--output", str(tmp_path / "run")]
    assert main(["finetune", *data, *short, "--precision", "fp32"]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["metrics"] == pytest.approx(record["after"]["metrics"], rel=1e-5)
    assert main(["preview", *data, "--save", str(tmp_path / "sheet.png")]) == 0
    assert Image.open(tmp_path / "sheet.png").format == "PNG"
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_an_interrupted_run_goes_on_to_the_same_end(recipe, monkeypatch):
    whole = recipe("whole", train={"steps": 6})
    finetune(whole, progress=False)
    monkeypatch.setattr(InterruptCallback, "on_step_end", _interrupt_at_step_3)
    parts = recipe("parts", train={"steps": 6})
    with pytest.raises(KeyboardInterrupt):
        finetune(parts, progress=False)
    monkeypatch.undo()
    record = finetune(parts, resume=True, progress=False)
    assert record.resumed_from == 3
    one, other = (load_file(Path(r.output) / "adapter" / "adapter_model.safetensors") for r in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def _interrupt_at_step_3(self, args, state, control, **kwargs):
    if state.global_step == 3:
        self._was_pressed = lambda: True
        control.should_save = control.should_training_stop = True


def test_the_record_counts_and_names_what_was_converted(tmp_path, tiny_vit):
    for name, colour in (("dark", 0), ("light", 200)):
        (tmp_path / name).mkdir()
        for number in range(9):
            Image.new("L", (16, 16), colour).save(tmp_path / name / f"{number}.png")
    facts = open_photos(tmp_path, tiny_vit).facts()
    assert facts["converted"]["one channel"]["count"] == facts["train"] == 14
    assert len(facts["converted"]["one channel"]["first"]) == 5
    assert all(Path(name).is_file() for name in facts["converted"]["one channel"]["first"])


def test_settings_of_another_task_are_refused(recipe):
    with pytest.raises(
        EvaError, match=r"'data' of task 'vision' has no setting 'max_length'; it belongs to task generation"
    ):
        recipe(data={"max_length": 100})
