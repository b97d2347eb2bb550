"""What evatune means by its settings, what PEFT has adapted then, and what the documentation says: one and the same."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

import evatune
from evatune.activations.layers.targets import TargetRules, find_targets
from evatune.adapters import save_adapter
from evatune.adapters.lora import find_adapter
from evatune.errors import EvaError, EvaWarning

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"vocab_size": 64}
EXPERTS = TEXT | {"num_key_value_heads": 2, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8}
DEEPSEEK = EXPERTS | LATENT | {"num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
IMAGE = SIZES | {"image_size": 32, "patch_size": 8, "num_labels": 3}


class Encoder(nn.Module):
    """Plain torch: attention modules, and a head by name."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(16, 3)

    def forward(self, input_ids):
        return self.classifier(self.layers(self.embed(input_ids)))


class Nested(nn.Module):
    """Names that are endings of other names."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in range(2))}
        )
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in range(2))
        self.fc = nn.Linear(8, 8)


def of(cls, config, settings):
    return lambda: getattr(transformers, cls)(getattr(transformers, config)(**settings))


FAMILIES = {
    # build, two endings, one regular expression, PEFT's task type, heads that are trained whole
    "llama": (of("LlamaForCausalLM", "LlamaConfig", TEXT), ["q_proj", "down_proj"], r".*\.1\..*proj", "CAUSAL_LM", ()),
    "gpt2": (
        of("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
        ["c_attn", "mlp.c_proj"],
        r".*\.h\.0\.mlp\.c_fc",
        "CAUSAL_LM",
        (),
    ),
    "bert": (
        of("BertForSequenceClassification", "BertConfig", TEXT),
        ["query", "output.dense"],
        r"bert\.encoder\.layer\.0\..*(key|value)",
        "SEQ_CLS",
        ("classifier",),
    ),
    "bert-tokens": (
        of("BertForTokenClassification", "BertConfig", TEXT),
        ["key", "intermediate.dense"],
        r".*query",
        "TOKEN_CLS",
        ("classifier",),
    ),
    "bert-questions": (
        of("BertForQuestionAnswering", "BertConfig", TEXT),
        ["key", "value"],
        r".*intermediate\.dense",
        "QUESTION_ANS",
        ("qa_outputs",),
    ),
    "t5": (
        of("T5ForConditionalGeneration", "T5Config", T5),
        ["q", "EncDecAttention.o"],
        r"decoder.*\.(k|v)",
        "SEQ_2_SEQ_LM",
        (),
    ),
    "vit": (
        of("ViTForImageClassification", "ViTConfig", IMAGE),
        ["q_proj", "fc1"],
        r".*\.0\..*(q_proj|query)",
        None,
        ("classifier",),
    ),
    "clip": (
        of("CLIPModel", "CLIPConfig", {"text_config": TEXT, "vision_config": IMAGE}),
        ["v_proj", "fc2"],
        r"vision_model.*q_proj",
        None,
        (),
    ),
    "mixtral": (
        of("MixtralForCausalLM", "MixtralConfig", EXPERTS | {"num_local_experts": 4}),
        ["q_proj", "experts.down_proj"],
        r".*\.0\..*(v_proj|w2)",
        "CAUSAL_LM",
        (),
    ),
    "qwen3-moe": (
        of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS | {"moe_intermediate_size": 24, "num_experts": 4}),
        ["o_proj", "gate"],
        r".*\.1\.mlp\..*proj",
        "CAUSAL_LM",
        (),
    ),
    "olmoe": (
        of("OlmoeForCausalLM", "OlmoeConfig", EXPERTS | {"num_experts": 4, "eos_token_id": 1}),
        ["k_proj", "gate_up_proj"],
        r".*(q_proj|gate)",
        "CAUSAL_LM",
        (),
    ),
    "deepseek": (
        of(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            DEEPSEEK | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        ),
        ["kv_b_proj", "shared_experts.up_proj"],
        r".*\.(0|1)\.mlp\..*down_proj",
        "CAUSAL_LM",
        (),
    ),
    "glm4-moe": (
        of(
            "Glm4MoeForCausalLM",
            "Glm4MoeConfig",
            DEEPSEEK | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8},
        ),
        ["q_proj", "down_proj"],
        r".*\.0\.mlp\..*proj",
        "CAUSAL_LM",
        (),
    ),
    "torch-encoder": (
        Encoder,
        ["self_attn", "linear2"],
        r"layers\.layers\.0\.(self_attn|linear1)",
        None,
        ("classifier",),
    ),
    "nested": (Nested, ["layers.1.fc", "layers.0.fc"], r"layers\.\d\.fc", None, ()),
}


def settings_of(kind):
    build, endings, regex, task_type, _ = FAMILIES[kind]
    every = [target.name for target in find_targets(build(), TargetRules())]
    for task in dict.fromkeys([None, task_type]):
        yield {}, task
        yield {"target_modules": endings}, task
    yield {"target_modules": regex}, None
    yield {"target_modules": every[1::3]}, None
    yield {"target_modules": every[:1]}, None
    yield {"exclude_modules": endings[:1]}, None
    yield {"exclude_modules": r".*\.0\..*"}, None
    yield {"target_modules": endings, "exclude_modules": r".*\.1\..*"}, None
    yield {"layers_to_transform": [1]}, None
    if kind != "nested":
        yield {"target_modules": endings, "layers_to_transform": 1}, None


CASES = [(kind, *case) for kind in FAMILIES for case in settings_of(kind)]


def documented(model, heads, settings):
    """The names that docs/measuring.md promises, from names and classes alone."""
    linear, answers = [], {}
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            continue
        if isinstance(module, nn.Linear | nn.MultiheadAttention) or type(module).__name__ == "Conv1D":
            linear.append(name)
        if type(module).__name__.endswith(("Experts", "NaiveMoe")):
            former = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "down_proj": ("w2",)}
            for part, names in former.items():
                linear.append(f"{name}.{part}")
                answers[f"{name}.{part}"] = [name, *(f"{name}.{old}" for old in names)]
        if type(module).__name__.lower().endswith("router"):
            linear.append(f"{name}.weight")
            answers[f"{name}.weight"] = [name]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    left_out = {*heads, *(name for name, module in model.named_modules() if module is output and output is not None)}

    def ends(name, wanted):
        return any(name == ending or name.endswith("." + ending) for ending in wanted)

    found = []
    for name in linear:
        names = [name, *answers.get(name, [])]
        excluded, targets = settings.get("exclude_modules") or (), settings.get("target_modules")
        if any(re.fullmatch(excluded, n) if isinstance(excluded, str) else ends(n, excluded) for n in names):
            continue
        layer = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        wanted = settings.get("layers_to_transform")
        if wanted is not None and (
            layer is None or int(layer[1]) not in ([wanted] if isinstance(wanted, int) else wanted)
        ):
            continue
        if targets is None:
            meant = not any(name == head or name.startswith(f"{head}.") for head in left_out)
        elif isinstance(targets, str):
            meant = any(re.fullmatch(targets, n) for n in names)
        else:
            meant = any(ends(n, targets) for n in names)
        found += [name] if meant else []
    return found


def adapted(model):
    """The names that PEFT itself notes, with the weights of linear layers under the names of these."""
    base = model.get_base_model()
    found = set(model.targeted_module_names)
    for name in model.targeted_parameter_names:
        owner = base.get_submodule(name.rpartition(".")[0])
        while hasattr(owner, "base_layer"):
            owner = owner.base_layer
        found.add(name.removesuffix(".weight") if isinstance(owner, nn.Linear) else name)
    return found


def test_there_are_many_cases():
    assert len(CASES) >= 150


@pytest.mark.parametrize(("kind", "settings", "task_type"), CASES, ids=str)
def test_what_is_found_what_is_adapted_and_what_is_documented(kind, settings, task_type):
    build, *_, heads = FAMILIES[kind]
    torch.manual_seed(0)
    found = [target.name for target in find_targets(build(), TargetRules(**settings))]
    assert sorted(found) == sorted(documented(build(), heads, settings))
    model = evatune.prepare(build(), method="lora", rank=2, task_type=task_type, **settings)
    assert adapted(model) == set(found)
    assert list(find_adapter(model, "default")[2]) and set(find_adapter(model, "default")[2]) == set(found)
    wrapped = {n for n, m in model.get_base_model().named_modules() if isinstance(m, ModulesToSaveWrapper)}
    assert wrapped == set(heads)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or ".modules_to_save." in name for name in trainable)
    assert all(any(f".{head}.modules_to_save." in name for name in trainable) for head in heads)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_saved_adapter_is_read_onto_the_same_modules(kind, tmp_path):
    build, *_ = FAMILIES[kind]
    model = evatune.prepare(build(), method="lora", rank=2)
    save_adapter(model, tmp_path / "adapter")
    assert adapted(PeftModel.from_pretrained(build(), tmp_path / "adapter")) == adapted(model)


PLAIN = ["llama", "gpt2", "bert", "t5", "vit", "clip"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(kind, settings) for kind, settings, task in CASES if kind in PLAIN and not task and "target_modules" in settings],
    ids=str,
)
def test_names_and_expressions_mean_what_they_mean_to_peft(kind, settings):
    """Its all-linear depends on the task type."""
    build, *_ = FAMILIES[kind]
    theirs = get_peft_model(build(), LoraConfig(r=2, **settings))
    assert adapted(theirs) == {target.name for target in find_targets(build(), TargetRules(**settings))}


# -- heads ------------------------------------------------------------------------------------------------------------


def test_a_head_that_is_named_gets_an_adapter_and_one_that_is_excluded_stays(outputs):
    build = FAMILIES["bert"][0]
    named = evatune.prepare(build(), method="lora", rank=2, target_modules=["query", "classifier"])
    assert "classifier" in adapted(named)
    assert not any(isinstance(module, ModulesToSaveWrapper) for module in named.modules())
    kept = evatune.prepare(build(), method="lora", rank=2, exclude_modules=["classifier"])
    assert "classifier" not in adapted(kept)
    assert not any("classifier" in name for name, p in kept.named_parameters() if p.requires_grad)
    further = evatune.prepare(build(), method="lora", rank=2, modules_to_save=["pooler"])
    wrapped = {n for n, m in further.get_base_model().named_modules() if isinstance(m, ModulesToSaveWrapper)}
    assert wrapped == {"bert.pooler", "classifier"}
    assert "bert.pooler.dense" not in adapted(further)


def test_a_head_cannot_both_have_an_adapter_and_be_trained_whole():
    base = FAMILIES["bert"][0]()
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(EvaError, match=r"PEFT left out 'classifier' against the settings .* trained whole"):
        evatune.prepare(base, method="lora", rank=2, target_modules=["query", "classifier"], task_type="SEQ_CLS")
    assert [type(module) for module in base.modules()] == kinds


@pytest.mark.parametrize("method", ["eva", "pissa", "vera", "adalora", "boft"])
def test_the_head_of_a_classifier_is_trained_whole_by_every_method(method):
    torch.manual_seed(0)
    build, *_ = FAMILIES["vit"]
    batches = [{"pixel_values": torch.randn(4, 3, 32, 32)} for _ in range(3)]
    options = {"batches": batches, "progress": False} if method == "eva" else {}
    model = evatune.prepare(build(), method=method, rank=2, total_steps=10, **options)
    head = [parameter for name, parameter in model.named_parameters() if ".classifier.modules_to_save.default." in name]
    assert len(head) == 2 and all(parameter.requires_grad for parameter in head)


# -- mixtures of experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["prepare", "initialize"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "olmoe", "deepseek", "glm4-moe"])
def test_mixtures_start_save_load_and_merge_as_others_do(kind, how, outputs, tmp_path):
    def build():
        torch.manual_seed(0)
        return FAMILIES[kind][0]().eval()

    batches = [{"input_ids": torch.randint(0, 64, (4, 20))} for _ in range(4)]
    base = build()
    expected = outputs(base, batches[0])
    if how == "prepare":
        model = evatune.prepare(base, method="eva", rank=4, batches=batches, progress=False).eval()
    else:
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=1, target_modules="all-linear")).eval()
        evatune.initialize(model, batches, rho=2.0, progress=False)
    torch.testing.assert_close(outputs(model, batches[0]), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    trained = outputs(model, batches[0])
    assert (trained - expected).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(build(), tmp_path).eval(), batches[0]), trained)
    torch.testing.assert_close(outputs(model.merge_and_unload(), batches[0]), trained)


def test_dropout_and_dora_are_refused_where_peft_adds_to_the_weights():
    build = FAMILIES["qwen3-moe"][0]
    with pytest.raises(EvaError, match=r"lora_dropout=0.1 is impossible on 'model.layers.0.mlp.experts.gate_up_proj'"):
        evatune.prepare(build(), method="lora", lora_dropout=0.1)
    with pytest.raises(EvaError, match=r"PEFT cannot do 'dora' here: lora.ParamWrapper does not work with use_dora"):
        evatune.prepare(build(), method="dora")
    evatune.prepare(build(), method="dora", lora_dropout=0.1, exclude_modules=["experts", "gate"])


@pytest.mark.parametrize("method", ["pissa", "vera", "boft", "adalora"])
def test_methods_of_linear_layers_name_the_experts(method):
    with pytest.raises(
        EvaError, match=r"works on linear layers, and '.*(experts.gate_up_proj|gate.weight)' is a param"
    ):
        evatune.prepare(FAMILIES["mixtral"][0](), method=method, rank=2, total_steps=10)


def shared_head():
    return of("LlamaForCausalLM", "LlamaConfig", TEXT | {"tie_word_embeddings": True})()


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"target_modules": ["lm_head", "q_proj"]}, "lm_head"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "model.embed_tokens"),
        ({"target_modules": ["lm_head", "embed_tokens"]}, "model.embed_tokens"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, "model.embed_tokens"),
    ],
    ids=str,
)
def test_one_sentence_tells_that_a_weight_of_what_is_trained_is_shared(settings, trained):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        evatune.prepare(shared_head(), method="lora", **settings)
    assert [warning.category for warning in told] == [EvaWarning]
    other = {"lm_head": "model.embed_tokens"}.get(trained, "lm_head")
    assert str(told[0].message).startswith(f"{trained!r} is trained and shares its weight with {other!r}, which does")


@pytest.mark.parametrize(
    "settings", [{}, {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}]
)
def test_nothing_is_told_where_what_is_trained_shares_no_weight(settings):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        evatune.prepare(shared_head(), method="lora", **settings)
    assert not told


def test_a_weight_that_is_shared_inside_of_what_is_trained_whole_stays_shared():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    model = nn.Sequential(OrderedDict(body=nn.Linear(8, 8), head=Head()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", EvaWarning)
        evatune.prepare(model, method="lora", target_modules=["body"], modules_to_save=["head"], rank=4)
