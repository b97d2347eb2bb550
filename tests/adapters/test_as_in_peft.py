"""PEFT's own call for EVA, and what PEFT saves of EVA."""

from __future__ import annotations

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft import initialize_lora_eva_weights as pefts_own
from peft.tuners.lora.eva import get_eva_state_dict
from safetensors.torch import save_file

import evatune
from evatune import EvaError, EvaWarning, initialize_lora_eva_weights
from evatune.adapters import initialized_plan, require_initialized
from evatune.adapters.lora import find_adapter


def wrapped(base, *, low_cpu_mem_usage=True, target_modules="all-linear", **eva):
    settings = {"r": 4, "lora_alpha": 2, "target_modules": target_modules}
    config = LoraConfig(**settings, init_lora_weights="eva", eva_config=EvaConfig(**eva))
    return get_peft_model(base, config, low_cpu_mem_usage=low_cpu_mem_usage).eval()


def downs(model):
    return {name: layer.lora_A["default"].weight for name, layer in find_adapter(model, "default")[2].items()}


def test_the_lines_of_the_poster_run(llama, batches, outputs, tmp_path):
    expected = outputs(llama(), batches[0])
    model = wrapped(llama(), rho=2.0)
    plan = initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    assert initialized_plan(model) is plan
    assert (plan.rho, plan.total) == (2.0, 4 * 14)
    assert len(set(plan.ranks.values())) > 1
    require_initialized(model)
    torch.testing.assert_close(outputs(model, batches[0]), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(outputs(loaded, batches[0]), expected)


@pytest.mark.parametrize(
    ("eva", "call", "measuring"),
    [
        ({"rho": 1.5, "whiten": True, "use_label_mask": False}, {"rho": 1.5, "whiten": True}, {}),
        ({"tau": 0.9, "use_label_mask": False}, {}, {"tau": 0.9}),
        ({"use_label_mask": True}, {}, {"use_label_mask": True}),
        ({"use_label_mask": True, "label_mask_value": 7}, {}, {"use_label_mask": True}),
    ],
    ids=str,
)
def test_what_the_eva_config_says_counts(llama, lora, batches, eva, call, measuring):
    ignored = eva.get("label_mask_value", -100)
    hidden = [batch["labels"].clone() for batch in batches]
    for labels in hidden:
        labels[:, :6] = ignored
    model, twin = wrapped(llama(), **eva), lora(llama())
    plan = initialize_lora_eva_weights(
        model, [b | {"labels": labels} for b, labels in zip(batches, hidden, strict=True)], show_progress_bar=False
    )
    usual = [labels.masked_fill(labels == ignored, -100) for labels in hidden]
    given = [b | {"labels": labels} for b, labels in zip(batches, usual, strict=True)]
    assert plan == evatune.initialize(twin, given, progress=False, **call, **measuring)
    for name, matrix in downs(twin).items():
        torch.testing.assert_close(downs(model)[name], matrix)
    assert torch.equal(batches[0]["labels"], batches[0]["input_ids"])  # nothing was written into the caller's batches


def test_batches_without_labels_have_none_to_go_by(llama, batches):
    unlabelled = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    initialize_lora_eva_weights(wrapped(llama(), use_label_mask=True), iter(unlabelled), show_progress_bar=False)


def test_alphas_stay_where_they_are_not_to_be_adjusted(llama, batches):
    plans = [
        initialize_lora_eva_weights(wrapped(llama(), adjust_scaling_factors=adjust), batches, show_progress_bar=False)
        for adjust in (True, False)
    ]
    assert plans[0].ranks == plans[1].ranks
    assert set(plans[1].alphas.values()) == {2.0}
    assert plans[0].alphas == {name: 2.0 * rank / 4 for name, rank in plans[0].ranks.items()}


def test_the_forward_function_is_called_with_the_batches(llama, batches):
    seen = []

    def forward(model, batch):
        seen.append(batch)
        return model(input_ids=batch["input_ids"])

    initialize_lora_eva_weights(wrapped(llama()), batches, forward_fn=forward, show_progress_bar=False)
    assert len(seen) >= 3


def test_spectra_may_stand_in_for_batches(llama, batches):
    spectra = evatune.measure(llama(), batches, rank=4, progress=False)
    assert initialize_lora_eva_weights(wrapped(llama()), spectra) == spectra.plan(4, lora_alpha=2.0)


@pytest.mark.parametrize("arguments", [{"prepare_layer_inputs_fn": len}, {"prepare_model_inputs_fn": len}], ids=str)
def test_rows_are_found_by_our_own_rules(llama, batches, arguments):
    with pytest.raises(EvaError, match=r"takes no prepare_model_inputs_fn .* row_mask="):
        initialize_lora_eva_weights(wrapped(llama()), batches, **arguments)
    with pytest.raises(EvaError, match="needs a dataloader or an eva_state_dict"):
        initialize_lora_eva_weights(wrapped(llama()))


# -- what PEFT saves --------------------------------------------------------------------------------------------------


_saved = {}


@pytest.fixture
def saved(llama, batches):
    """What PEFT measures, which takes it a second; measured once."""
    if not _saved:
        _saved.update(get_eva_state_dict(wrapped(llama(), low_cpu_mem_usage=False), batches, show_progress_bar=False))
    return {name: matrix.clone() for name, matrix in _saved.items()}


@pytest.mark.parametrize("suffix", ["", ".pt", ".safetensors"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_what_peft_has_saved_starts_the_same_adapter(
    llama, batches, outputs, saved, tmp_path, suffix, low_cpu_mem_usage
):
    theirs = wrapped(llama(), low_cpu_mem_usage=False)
    pefts_own(theirs, eva_state_dict=dict(saved))
    source = dict(saved)
    if suffix:
        source = tmp_path / f"eva{suffix}"
        matrices = {name: matrix.clone().contiguous() for name, matrix in saved.items()}
        save_file(matrices, source) if suffix == ".safetensors" else torch.save(matrices, source)
    ours = wrapped(llama(), low_cpu_mem_usage=low_cpu_mem_usage)
    plan = initialize_lora_eva_weights(ours, eva_state_dict=source)
    assert plan.ranks == {name.removeprefix("base_model.model."): len(matrix) for name, matrix in saved.items()}
    for name, matrix in downs(theirs).items():
        assert torch.equal(downs(ours)[name], matrix)
    scales = [find_adapter(model, "default")[2] for model in (ours, theirs)]
    assert {n: layer.scaling["default"] for n, layer in scales[0].items()} == pytest.approx(
        {n: layer.scaling["default"] for n, layer in scales[1].items()}
    )
    torch.testing.assert_close(outputs(ours, batches[0]), outputs(llama(), batches[0]))
    assert "explained" in plan.table()


def test_layers_that_were_not_saved_start_as_lora_does(llama, batches, saved, tmp_path):
    kept = {name: matrix for name, matrix in saved.items() if ".layers.0." in name}
    model = wrapped(llama())
    with pytest.warns(EvaWarning, match=r"7 of 14 layers are not in the eva_state_dict .*'model\.layers\.1\."):
        plan = initialize_lora_eva_weights(model, eva_state_dict=kept)
    assert len(plan.ranks) == 7
    layer = find_adapter(model, "default")[2]["model.layers.1.mlp.up_proj"]
    assert (layer.r["default"], layer.lora_A["default"].weight.shape) == (4, (4, 32))
    assert layer.lora_A["default"].weight.abs().max() <= 32**-0.5
    assert not layer.lora_B["default"].weight.any()
    model.save_pretrained(tmp_path)
    again = downs(PeftModel.from_pretrained(llama(), tmp_path))
    assert all(torch.equal(again[name], matrix) for name, matrix in downs(model).items())


def test_a_dictionary_of_another_model_is_refused(llama, saved, tmp_path):
    name = next(iter(saved))
    with pytest.raises(
        EvaError, match=r"matrix of shape \(3, 5\) for 'model.layers.0.self_attn.q_proj', .* 32 features"
    ):
        initialize_lora_eva_weights(wrapped(llama()), eva_state_dict={name: torch.zeros(3, 5)})
    with pytest.raises(EvaError, match=r"has no layer of this adapter: it begins with 'h.0'"):
        initialize_lora_eva_weights(wrapped(llama()), eva_state_dict={"h.0": torch.zeros(3, 5)})
    (tmp_path / "broken.pt").write_bytes(b"no tensors")
    with pytest.raises(EvaError, match=r"broken\.pt holds no eva_state_dict that can be read"):
        initialize_lora_eva_weights(wrapped(llama()), eva_state_dict=tmp_path / "broken.pt")
