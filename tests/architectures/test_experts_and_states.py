"""Mixtures of experts, and models that carry a state from position to position."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16}
LATENT |= {"num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
EXPERTS: dict[str, dict] = {
    "MixtralForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    "OlmoeForCausalLM": {},
    "DeepseekV2ForCausalLM": {**LATENT, "topk_method": "greedy", "num_experts_per_tok": 2},
    "DeepseekV3ForCausalLM": LATENT,
    "Glm4MoeForCausalLM": {},
    "PhimoeForCausalLM": {},
    "GptOssForCausalLM": {},
    "JetMoeForCausalLM": {},
    "GraniteMoeForCausalLM": {},
    "Ernie4_5_MoeForCausalLM": {},
    "Llama4ForCausalLM": {},
    "MiniMaxForCausalLM": {},
}
# PEFT cannot wrap these routers: they are linear layers that answer with more than one tensor.
ROUTERS = {"PhimoeForCausalLM": {"exclude_modules": ["router"]}, "Llama4ForCausalLM": {"exclude_modules": ["router"]}}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
STATES: dict[str, dict] = {
    "MambaForCausalLM": {},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "FalconMambaForCausalLM": {},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "BambaForCausalLM": {**MAMBA, "attn_layer_indices": [1]},
    "RwkvForCausalLM": {},
    "RecurrentGemmaForCausalLM": {"block_types": ("recurrent", "attention"), "lru_width": 32},
    "Lfm2ForCausalLM": {},
    "Qwen3NextForCausalLM": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "GraniteMoeHybridForCausalLM": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "NemotronHForCausalLM": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 4,
        "chunk_size": 8,
        "layers_block_type": ["mamba", "attention"],
    },
}
# PEFT refuses to wrap `out_proj`, and an adapter on `dt_proj` is left out until it is merged, since Mamba multiplies by
# both weights without calling their modules.
WITHOUT = {
    "MambaForCausalLM": ["out_proj", "dt_proj"],
    "Mamba2ForCausalLM": ["out_proj"],
    "FalconMambaForCausalLM": ["out_proj", "dt_proj"],
    "JambaForCausalLM": ["dt_proj"],
    "NemotronHForCausalLM": ["out_proj"],
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name, tiny, texts, check):
    check(lambda: tiny(name, **EXPERTS[name]), texts(), peft=ROUTERS.get(name))


@pytest.mark.parametrize("name", STATES)
def test_state(name, tiny, texts, check):
    peft = {"exclude_modules": WITHOUT[name]} if name in WITHOUT else None
    unreached = r".*\.dt_proj" if "dt_proj" in WITHOUT.get(name, ()) else None
    check(lambda: tiny(name, **STATES[name]), texts(), peft=peft, unreached=unreached)
