"""`estimate`: bounds against the states of real measurements, counts against real passes."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from evatune import EvaError, estimate, measure
from evatune.activations.run import Run
from evatune.tables import byte_size

SETTINGS = {"batch_size": 6, "length": 12}


@pytest.fixture
def states(monkeypatch):
    """Measure and return, by input, the bytes of the largest state there was, and the rows of each batch."""
    largest: dict[str, int] = {}
    rows: dict[str, list[int]] = {}
    ordinary = Run.end_batch

    def end_batch(self, *args, **kwargs):
        for key, state in self.inputs.items():
            n_bytes = sum(tensor.nbytes for tensor in state.pca.state_dict().values())
            largest[key] = max(largest.get(key, 0), n_bytes)
            rows.setdefault(key, []).append(state.pca.n_samples_seen_)
        return ordinary(self, *args, **kwargs)

    monkeypatch.setattr(Run, "end_batch", end_batch)

    def run(model, batches, **options):
        largest.clear()
        rows.clear()
        spectra = measure(model, batches, tau=None, min_gain=None, progress=False, **options)
        return spectra, dict(largest), dict(rows)

    return run


def unpadded(batches):
    return [{name: value for name, value in batch.items() if name != "attention_mask"} for batch in batches]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "vit"])
@pytest.mark.parametrize("backend", ["auto", "exact", "sketch", "incremental"])
def test_states_stay_within_the_bound_which_is_no_idle_one(build, batches_for, states, kind, backend):
    model = build(kind)
    options = {"backend": backend, "n_components": 4}
    told = estimate(model, **SETTINGS, **options)
    spectra, largest, rows = states(model, unpadded(batches_for(kind, 3)), **options)
    assert told.traced and told.n_inputs == len(largest) == len(spectra.inputs)
    assert sum(kind.count * kind.n_targets for kind in told.kinds) == len(spectra)
    assert sum(largest.values()) <= told.state_bytes
    assert told.state_bytes <= 1.05 * sum(largest.values()) + 256 * len(largest)
    by_name = {kind.name: kind for kind in told.kinds}
    for key, n_bytes in largest.items():
        of_kind = by_name[".".join("*" if part.isdigit() else part for part in key.split("."))]
        assert n_bytes <= of_kind.state_bytes and of_kind.backend == spectra.inputs[key].backend
        assert of_kind.in_features == spectra.inputs[key].components.shape[1]
        if kind != "t5":  # its decoder gets fewer positions here
            assert rows[key][0] == of_kind.n_rows
    if backend == "auto":
        assert {kind.backend for kind in told.kinds} == {"exact"}


def test_the_bound_holds_for_wide_inputs_embeddings_and_convolutions(states):
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=2200, num_hidden_layers=1, num_attention_heads=4)
    )
    tokens = [{"input_ids": torch.randint(0, 64, (6, 12))} for _ in range(3)]
    options = {"n_components": 8, "target_modules": ["q_proj", "down_proj", "embed_tokens"]}
    told = estimate(model, **SETTINGS, **options)
    _, largest, _ = states(model, tokens, **options)
    assert {kind.backend for kind in told.kinds} == {"sketch", "exact", "counts"}
    assert [kind.width for kind in told.kinds if kind.backend == "sketch"] == [104]
    assert told.initial_bytes <= 1.05 * sum(largest.values()) + 256 * 3
    assert sum(largest.values()) <= told.state_bytes < 5 * told.initial_bytes
    assert f"{byte_size(told.initial_bytes)} at first, {byte_size(told.state_bytes)} at most" in told.table()

    images = ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        )
    )
    options = {"n_components": 8, "target_modules": ["projection"]}
    told = estimate(images, **SETTINGS, **options)
    _, largest, rows = states(images, [{"pixel_values": torch.randn(6, 3, 16, 16)} for _ in range(2)], **options)
    (key,) = largest
    assert largest[key] <= told.state_bytes and told.length is None
    assert rows[key][0] == told.kinds[0].n_rows == 6 * 16


def test_a_seven_billion_model_is_estimated_from_its_configuration():
    config = LlamaConfig(architectures=["LlamaForCausalLM"])  # the shape of Llama 2 7B
    told = estimate(config, rank=16, max_batches=8, weights_dtype=torch.bfloat16)
    assert told.weights_bytes == 2 * 6_738_415_616
    assert told.block_bytes == 2 * 202_383_360
    assert told.hidden_bytes == 8 * 4 * 256 * 4096 * 2
    assert told.n_inputs == 128 and {kind.backend for kind in told.kinds} == {"sketch"}
    assert told.initial_bytes < 600e6 and told.state_bytes < 1.9e9
    assert not getattr(config, "dtype", None), "what was given is not changed"


def test_ranks_by_target_name_keep_components_for_the_largest(build):
    options = {"target_modules": ["q_proj", "down_proj"], "rho": 1.5, "backend": "sketch"} | SETTINGS
    ranks = {f"model.layers.{n}.{name}": 2 for n in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")}
    last = "model.layers.1.mlp.down_proj"
    model = build("llama")
    assert estimate(model, rank=ranks | {last: 6}, **options) == estimate(model, rank=6, **options)
    assert estimate(model, rank=ranks, **options) == estimate(model, rank=2, **options)
    assert estimate(model, rank=2, **options) != estimate(model, rank=6, **options)
    with pytest.raises(EvaError, match=r"rank names 'down_proj', which is no target"):
        estimate(model, rank=ranks | {"down_proj": 6}, **options)
    del ranks[last]
    with pytest.raises(EvaError, match=r"rank names no value for 1 targets, the first 'model\.layers\.1\.mlp"):
        estimate(model, rank=ranks, **options)


def test_fused_experts_are_followed_too(tmp_path, caplog):
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # the configuration is enough
    told = estimate(tmp_path / "model", **SETTINGS)
    rows = {kind.name.removeprefix("model.layers.*."): kind.n_rows for kind in told.kinds}
    assert told.traced and {"self_attn.q_proj", "self_attn.o_proj", "mlp.experts.down_proj"} <= set(rows)
    assert rows["mlp.experts.down_proj"] == 6 * 12, "an expert may get every position"
    assert not caplog.records  # the attempt in float32 fails, and another one follows


def test_without_a_trace_every_target_counts(build, monkeypatch):
    # The function hides its module.
    monkeypatch.setattr(sys.modules["evatune.activations.estimate"], "follow", lambda *args, **kwargs: None)
    told = estimate(build("llama"), batch_size=6, length=12)
    assert (told.traced, told.n_inputs) == (False, 14)
    assert {kind.n_rows for kind in told.kinds} == {72}
    assert "cannot run without its weights" in told.table()


def test_the_table_says_what_the_numbers_are(build):
    told = estimate(build("llama"), batch_size=6, length=12, rank=2, max_batches=4)
    text = told.table()
    for part in ("model.layers.*.self_attn.q_proj (+2)", "exact", "kept from check to check", "at most"):
        assert part in text
    assert json.loads(json.dumps(told.to_json()))["state_bytes"] == told.state_bytes


def test_bad_settings_and_models_are_refused(build):
    config = LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=1)
    with pytest.raises(EvaError, match="length must be a whole number of at least 1, got 0"):
        estimate(config, length=0)
    with pytest.raises(EvaError, match="backend is 'exakt', but must be one of"):
        estimate(config, backend="exakt")
    with pytest.raises(EvaError, match=r"no module of the model matches target_modules='q_prj'.*'q_proj'"):
        estimate(config, target_modules=["q_prj"])
    with pytest.raises(EvaError, match="Linear has no configuration"):
        estimate(nn.Linear(2, 2))
    with pytest.raises(EvaError, match="there is no model folder"):
        estimate("./absent")
