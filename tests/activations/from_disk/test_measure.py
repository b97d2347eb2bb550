"""`measure_from_disk` against `measure` on the loaded model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.on_device import TEST_DEVICE
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5EncoderModel,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from evatune import EvaError, Spectra, measure, measure_from_disk
from evatune.activations.absent import AbsentTensor
from evatune.activations.from_disk import checkpoint as checkpoint_module
from evatune.activations.from_disk.checkpoint import Checkpoint, StoredWeights
from evatune.activations.from_disk.outline import HIDDEN, Outline
from evatune.activations.from_disk.waiting import WaitingTensors

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}

# One family for each thing that can differ: what each is here for stands beside it.
FAMILIES = {
    # rotary embeddings and masks of two kinds, by layer
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SMALL,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            pad_token_id=0,
        )
    ),
    # a target before the blocks and one behind them
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
        )
    ),
    # blocks that return tuples
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    # experts that are stored one by one and stacked in the model
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3)),
    # a weight outside the blocks that is used without calling its module
    "deberta": lambda: DebertaV2ForSequenceClassification(
        DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], max_position_embeddings=64)
    ),
    # weights that are stored fused, images
    "dinov2": lambda: Dinov2ForImageClassification(
        Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
            mlp_ratio=2,
            use_swiglu_ffn=True,
        )
    ),
}
BATCHES_OF = {"deberta": "bert", "dinov2": "vit"}


@pytest.fixture
def stored(build, tmp_path):
    """Save a tiny model, and return its folder and the model as it is loaded from there."""

    def save(kind: str | nn.Module, **options) -> tuple[Path, nn.Module]:
        torch.manual_seed(0)
        model = kind if isinstance(kind, nn.Module) else FAMILIES[kind]() if kind in FAMILIES else build(kind)
        folder = tmp_path / "model"
        model.save_pretrained(folder, **options)
        return folder, type(model).from_pretrained(folder).eval()

    return save


def assert_equal(got, expected):
    assert got.targets == expected.targets and list(got.targets) == list(expected.targets)
    assert list(got.inputs) == list(expected.inputs)
    for key, spectrum in expected.inputs.items():
        for name in ("components", "singular_values", "mean"):
            torch.testing.assert_close(getattr(got.inputs[key], name), getattr(spectrum, name), rtol=0, atol=0, msg=key)
        for name in ("total_variance", "n_rows", "n_batches", "stopped", "backend"):
            assert getattr(got.inputs[key], name) == getattr(spectrum, name), (key, name)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", *FAMILIES])
def test_every_family_equals_the_ordinary_pass_to_the_last_bit(stored, batches_for, quiet, kind):
    folder, model = stored(kind)
    batches = batches_for(BATCHES_OF.get(kind, kind if kind in ("bert", "vit") else "llama"))
    assert_equal(measure_from_disk(folder, batches, **quiet_(quiet)), measure(model, batches, **quiet))


def quiet_(quiet):
    """The options that both functions have, and the device: rules cannot stop a measurement from disk."""
    return {name: value for name, value in quiet.items() if name not in ("tau", "min_gain")} | {"device": TEST_DEVICE}


@pytest.mark.parametrize(
    "options",
    [
        {"waiting_gib": 0.0},
        {"use_label_mask": True},
        {"dtype": torch.bfloat16},
        {"backend": "sketch", "center": False, "seed": 3},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"max_batches": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_mean_what_they_mean_in_measure(stored, batches_for, quiet, tmp_path, options):
    folder, model = stored("llama")
    batches = batches_for("llama")
    got = measure_from_disk(folder, batches, scratch=tmp_path, **quiet_(quiet) | options)
    options.pop("waiting_gib", None)
    assert_equal(got, measure(model, batches, **quiet | options))
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "what waited on disk is gone"


def test_ranks_by_target_name_mean_what_they_mean_in_measure(stored, batches_for, quiet, tmp_path):
    folder, model = stored("llama")
    batches = batches_for("llama")
    options = quiet | {"target_modules": ["q_proj", "down_proj"]}
    del options["n_components"]
    ranks = {name: 1 + 2 * name.endswith("down_proj") for name in measure(model, batches, **options)}
    got = measure_from_disk(folder, batches, rank=dict(reversed(ranks.items())), **quiet_(options))
    assert_equal(got, measure(model, batches, rank=ranks, **options))
    assert got.n_components == 6 and got.plan(ranks).base_ranks == ranks
    loaded = Spectra.load(got.save(tmp_path / "spectra"))
    assert loaded.settings["rank"] == ranks and list(loaded.settings["rank"]) == list(ranks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.self_attn.q_proj": 0}, r"rank of 'model\.layers\.0\S+' is 0, but must be at least 1"),
        ({"model.layers.9.self_attn.q_proj": 2}, r"rank names 'model\.layers\.9\.\S+', which is no target"),
        (
            {"model.layers.1.self_attn.q_proj": None},
            r"rank names no value for 1 targets, the first 'model\.layers\.1\.",
        ),
    ],
)
def test_ranks_that_fit_no_target_are_refused_before_any_batch(stored, change, message):
    def no_batches():
        raise AssertionError("a batch was asked for")
        yield

    folder, _ = stored("llama")
    ranks = {f"model.layers.{n}.self_attn.q_proj": 2 for n in range(2)} | change
    ranks = {name: rank for name, rank in ranks.items() if rank is not None}
    with pytest.raises(EvaError, match=message):
        measure_from_disk(folder, no_batches(), target_modules=["q_proj"], rank=ranks, progress=False)


def test_weights_are_read_once_from_their_shards_and_none_behind_the_last_target(
    stored, batches_for, quiet, monkeypatch
):
    folder, model = stored("llama", max_shard_size="12KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    read, filled = [], []
    ordinary = Checkpoint.read

    def spy(self, key):
        read.append(key)
        return ordinary(self, key)

    def watch(self, prefix, filling=StoredWeights.fill):
        filling(self, prefix)
        layers = {
            name.split(".")[2] for name, p in self.model.named_parameters() if "layers." in name and not p.is_meta
        }
        filled.append(layers)

    monkeypatch.setattr(Checkpoint, "read", spy)
    monkeypatch.setattr(StoredWeights, "fill", watch)
    options = {"target_modules": ["q_proj", "gate_proj"]}
    batches = batches_for("llama")
    assert_equal(
        measure_from_disk(folder, iter(batches), **quiet_(quiet), **options),
        measure(model, batches, **quiet, **options),
    )
    assert len(read) == len(set(read)) and "lm_head.weight" not in read and "model.norm.weight" not in read
    assert max(map(len, filled)) == 1 and {"0"} in filled and {"1"} in filled
    read.clear()
    measure_from_disk(folder, batches, layers_to_transform=[0], target_modules=["q_proj"], **quiet_(quiet))
    assert read and not any("layers.1." in key for key in read)


def test_no_batch_beyond_the_last_is_drawn_and_generators_are_left_alone(stored, batches_for, quiet):
    folder, _ = stored("llama")

    def shuffled():
        for batch in batches_for("llama", 4):
            torch.rand(3)
            yield batch

    batches = shuffled()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    spectra = measure_from_disk(folder, batches, max_batches=2, **quiet_(quiet))
    assert {s.stopped for s in spectra.inputs.values()} == {"batch cap"}
    assert torch.equal(torch.get_rng_state(), before) and len(list(batches)) == 2
    assert spectra.settings["from_disk"] is True and spectra.settings["weights_dtype"] == "torch.float32"
    assert spectra.model_name == str(folder)


def test_weights_stay_in_the_dtype_of_the_file_unless_asked(stored, build, batches_for, quiet):
    folder, model = stored(build("llama").to(torch.bfloat16))
    assert model.dtype == torch.bfloat16
    batches = batches_for("llama")
    assert_equal(measure_from_disk(folder, batches, **quiet_(quiet)), measure(model, batches, **quiet))
    got = measure_from_disk(folder, batches, weights_dtype=torch.float32, **quiet_(quiet))
    assert_equal(got, measure(model.float(), batches, **quiet))


def test_a_base_model_is_measured_with_another_head_and_a_forward_of_ones_own_is_called(stored, batches_for, quiet):
    folder, model = stored(LlamaModel(transformers.LlamaConfig(**SMALL)))
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    batches = batches_for("llama")
    got = measure_from_disk(folder, batches, head="causal-lm", **quiet_(quiet))
    assert_equal(got, measure(whole, batches, **quiet))

    def forward(model, batch):
        return model(batch["input_ids"][:, :5], use_cache=False)

    got = measure_from_disk(folder, [{"input_ids": b["input_ids"]} for b in batches], forward=forward, **quiet_(quiet))
    assert_equal(got, measure(model, [{"input_ids": b["input_ids"][:, :5]} for b in batches], **quiet))


def test_of_tied_weights_the_one_that_is_stored_is_read(stored, build, batches_for, quiet):
    model = build("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    folder, model = stored(model)
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    batches = batches_for("llama")
    assert_equal(measure_from_disk(folder, batches, **quiet_(quiet)), measure(model, batches, **quiet))


def test_the_last_block_ends_at_its_last_target(stored, batches_for, quiet, monkeypatch):
    folder, _ = stored("llama")
    passes, ordinary = [], LlamaMLP.forward

    def count(self, hidden):
        passes.append(not isinstance(hidden, AbsentTensor))
        return ordinary(self, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", count)
    batches = [{"input_ids": batch["input_ids"]} for batch in batches_for("llama")]
    measure_from_disk(folder, batches, target_modules=["q_proj"], **quiet_(quiet))
    assert sum(passes) == 3 + 1, "three times in the first block, and in the last one only by the pass that finds out"


def test_older_transformers_know_prefixes_and_layer_norms(stored, batches_for, quiet, monkeypatch):
    folder, _ = stored(LlamaModel(transformers.LlamaConfig(**SMALL)))
    batches = batches_for("llama")
    expected = measure_from_disk(folder, batches, head="causal-lm", **quiet_(quiet))
    monkeypatch.setattr(checkpoint_module, "_conversion_rules", lambda model: None)
    assert_equal(measure_from_disk(folder, batches, head="causal-lm", **quiet_(quiet)), expected)


def save_t5_encoder(folder):
    config = T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(folder)


def save_albert(folder):
    AlbertForSequenceClassification(AlbertConfig(**SMALL, embedding_size=16)).save_pretrained(folder)


def save_swin(folder):
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    SwinForImageClassification(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("save", "batches", "message"),
    [
        (save_t5_encoder, "llama", "T5EncoderModel cannot be run block by block"),
        (save_albert, "bert", "runs 3 layers with fewer blocks"),
        (save_swin, "vit", "SwinForImageClassification cannot be run block by block"),
    ],
    ids=["blocks share a bias", "one block many times", "stages"],
)
def test_other_families_are_refused(batches_for, tmp_path, quiet, save, batches, message):
    save(tmp_path / "model")
    with pytest.raises(EvaError, match=f"{message}.* use `measure`"):
        measure_from_disk(tmp_path / "model", batches_for(batches), **quiet_(quiet))


def test_encoder_decoders_are_refused(stored, batches_for, quiet):
    folder, _ = stored("t5")
    with pytest.raises(EvaError, match="encoder-decoder"):
        measure_from_disk(folder, batches_for("t5"), **quiet_(quiet))


def test_targets_outside_any_list_of_blocks_are_refused(stored, batches_for, quiet):
    folder, _ = stored("bert")
    with pytest.raises(EvaError, match="has no list of blocks"):
        measure_from_disk(folder, batches_for("bert"), target_modules=["pooler.dense"], **quiet_(quiet))


def test_folders_that_cannot_be_read_in_parts_are_refused(stored, batches_for, quiet, tmp_path):
    folder, _ = stored("llama")
    batches, options = batches_for("llama"), quiet_(quiet)
    with pytest.raises(EvaError, match="there is no model folder"):
        measure_from_disk(tmp_path / "absent", batches, **options)
    with pytest.raises(EvaError, match="waiting_gib must be"):
        measure_from_disk(folder, batches, waiting_gib=-1, **options)
    with pytest.raises(EvaError, match="there was no batch"):
        measure_from_disk(folder, [], **options)
    config = json.loads((folder / "config.json").read_text())
    for change, message in [
        ({"architectures": ["LlamaForCausalLLM"]}, "LlamaForCausalLM.*give head"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "stored quantized"),
        ({"num_hidden_layers": 3}, "has no weights for 'model.layers.2.*load the model whole"),
        ({"intermediate_size": 40}, "does not fit the model, which expects"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(EvaError, match=message):
            measure_from_disk(folder, batches, **options)
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EvaError, match="damaged or cut short"):
        measure_from_disk(folder, batches, **options)
    weights.rename(folder / "weights.bin")
    with pytest.raises(EvaError, match="has no safetensors"):
        measure_from_disk(folder, batches, **options)


def test_a_failure_names_the_target_and_leaves_nothing_on_disk(stored, batches_for, quiet, tmp_path):
    folder, _ = stored("llama")
    batches = [{"inputs_embeds": torch.randn(2, 5, 32)}, {"inputs_embeds": torch.full((2, 5, 32), torch.nan)}]
    told = r"model\.layers\.0\.self_attn\.q_proj' in batch 2" if TEST_DEVICE == "cpu" else "hold NaN or infinite values"
    with pytest.raises(EvaError, match=told):
        measure_from_disk(folder, batches, waiting_gib=0, scratch=tmp_path, **quiet_(quiet) | {"n_components": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden, bias=None):
        return self.linear(hidden), torch.ones(1)


class _Passes(nn.Module):
    """Calls its two blocks with something in between."""

    def __init__(self, between) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.between = between

    def forward(self, rows):
        out = self.blocks[0](rows, None)
        return self.blocks[1](*self.between(out, rows))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda out, rows: (out[0], out[1]), "depends on the blocks before it"),
        (lambda out, rows: (out[0], {"bias": [out[0].mean()]}), "depends on the blocks before it"),
        (lambda out, rows: (out[0] + 1, None), "does not get what the block before it returned"),
        (lambda out, rows: (rows, None), "does not get what the block before it returned"),
        (lambda out, rows: (out[0], bool(out[0].sum() > 0)), "cannot be run block by block"),
    ],
)
def test_what_a_model_makes_of_a_hidden_state_between_blocks_is_found_out(between, reason):
    model = _Passes(between)
    outline = Outline(model, {f"blocks.{i}": block for i, block in enumerate(model.blocks)}, last="blocks.1")
    with pytest.raises(EvaError, match=reason):
        outline.learn_style(lambda: model(torch.ones(2, 4)))
    assert not any("forward" in vars(block) for block in model.blocks)


def test_a_block_that_is_called_twice_is_found_out():
    class Twice(_Passes):
        def forward(self, rows):
            out = self.blocks[0](*self.blocks[0](rows, None))
            return self.blocks[1](*out)

    model = Twice(None)
    outline = Outline(model, {f"blocks.{i}": block for i, block in enumerate(model.blocks)}, last="blocks.1")
    with pytest.raises(EvaError, match=r"'blocks\.0' is called twice"):
        outline.learn_style(lambda: model(torch.ones(2, 4)))


def test_an_outline_marks_the_hidden_state_and_keeps_the_other_arguments():
    mask = torch.ones(1)
    model = _Passes(lambda out, rows: (out[0], [mask]))
    outline = Outline(model, {f"blocks.{i}": block for i, block in enumerate(model.blocks)}, last="blocks.1")
    rows = torch.ones(2, 4)
    outline.learn_style(lambda: model(rows))
    hidden, calls = outline.record(lambda: model(rows))
    assert hidden is rows and [call.block for call in calls] == ["blocks.0", "blocks.1"]
    assert calls[0].args == (HIDDEN, None)
    assert calls[1].args[0] is HIDDEN and calls[1].args[1][0] is mask


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5).to(torch.bfloat16),
        torch.randn(4, 6).T,
        torch.ones(2, 1, 3, dtype=torch.bool).expand(2, 4, 3),
        torch.tensor(7),
        torch.empty(0, 3),
    ],
    ids=["bfloat16", "transposed", "expanded", "scalar", "empty"],
)
@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_tensors_come_back_from_waiting_as_they_were(tensor, limit, tmp_path):
    with WaitingTensors(limit, folder=tmp_path) as waiting:
        waiting["a"] = tensor
        back = waiting["a"]
        assert back.dtype == tensor.dtype and torch.equal(back, tensor)
        assert (waiting.on_disk > 0) == (limit == 0 and tensor.nbytes > 0)
    assert not list(tmp_path.iterdir())


def test_waiting_tensors_go_to_disk_beyond_the_limit_and_make_room_when_replaced(tmp_path):
    first, second = torch.arange(10.0), torch.arange(10.0, 20.0)
    with WaitingTensors(60, folder=tmp_path) as waiting:
        waiting["first"], waiting["second"] = first, second
        assert (waiting.in_memory, waiting.on_disk) == (40, 40)
        for _ in range(3):
            waiting["first"] = first + 1
            waiting["second"] = second + 1
        assert (waiting.in_memory, waiting.on_disk) == (40, 40)
        assert torch.equal(waiting["first"], first + 1) and torch.equal(waiting["second"], second + 1)
        waiting["first"] = torch.arange(2.0)
        waiting["second"] = second
        assert (waiting.in_memory, waiting.on_disk) == (48, 0)
        waiting["third"], waiting["fourth"] = first, second
        waiting["first"] = torch.arange(30.0)
        assert torch.equal(waiting["first"], torch.arange(30.0))
        assert torch.equal(waiting["third"], first) and torch.equal(waiting["fourth"], second)
