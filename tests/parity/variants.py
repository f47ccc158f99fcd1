"""The goldens' models: config values by family, chosen so that every part of the family matters.

`VARIANTS` maps a golden's name, `family-what`, to what differs from `start(family)`; its key
`save` is not config but how `make_goldens.py` draws the weights and writes the directory.
"""

from typing import Any

VOCAB = 128
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
MOE = {**BASE, **SPECIAL, "num_attention_heads": 4, "num_experts_per_tok": 2}
LATENT = {
    **MOE, "num_key_value_heads": 4, "num_hidden_layers": 3, "first_k_dense_replace": 1,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 8, "n_shared_experts": 2, "moe_intermediate_size": 16,
}  # fmt: skip
# What a family starts from where it is not BASE.
STARTS: dict[str, dict[str, Any]] = {
    "qwen3": {
        **BASE, "head_dim": 16, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2,
    },
    "olmo2": {**BASE, **SPECIAL},
    "olmo3": {**BASE, **SPECIAL, "num_hidden_layers": 4, "sliding_window": 24},
    "gpt2": {
        **SPECIAL, "vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4,
        "n_positions": 400,
    },
    "gpt_oss": {
        **MOE, "head_dim": 16, "intermediate_size": 16, "num_local_experts": 8,
        "sliding_window": 24,
    },
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**LATENT, "n_group": 4, "topk_group": 2},
    "mixtral": {**MOE, "intermediate_size": 16, "num_local_experts": 8},
    "qwen3_moe": {
        **MOE, "head_dim": 16, "moe_intermediate_size": 16, "num_experts": 8,
        "norm_topk_prob": True,
    },
    "llama4_text": {
        **MOE, "head_dim": 16, "intermediate_size": 16, "intermediate_size_mlp": 48,
        "num_local_experts": 4, "num_experts_per_tok": 1, "num_hidden_layers": 4,
        "attention_chunk_size": 48, "floor_scale": 64, "attn_scale": 0.5,
    },
    "qwen3_next": {
        **MOE, "head_dim": 16, "num_hidden_layers": 4, "num_experts": 4, "decoder_sparse_step": 1,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
    },
}  # fmt: skip


def start(family: str) -> dict[str, Any]:
    """The config values that every variant of the family begins with."""
    return STARTS.get(family, BASE)


def rope(kind: str, factor: float, theta: float = 10000.0) -> dict:
    """RoPE parameters of a type that takes a factor and nothing more."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, "factor": factor}}


def theta(value: float) -> dict:
    """RoPE without scaling at a base of its own."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}


def yarn(**more: Any) -> dict:
    """YaRN with more of its keys than it must have."""
    return {"rope_parameters": {**YARN, **more}}


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
OLDER = {"save": {"spelling": "older"}}
GQA = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {"head_dim": 16, "tie_word_embeddings": True}
GEMMA2 = {**GEMMA, "sliding_window": 24, "query_pre_attn_scalar": 24, "num_hidden_layers": 3}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA3_ROPE = {"sliding_attention": LOCAL, "full_attention": {**LOCAL, "rope_theta": 1000000.0}}
STRETCHED = {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1}
OLMO3_LOCAL = {"rope_type": "default", "rope_theta": 500000.0}
OLMO3_YARN = {
    "sliding_attention": OLMO3_LOCAL, "full_attention": {**YARN, "rope_theta": 500000.0},
}  # fmt: skip
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama-untied": {},
    "llama-tied": TIED,
    "llama-gqa": {**GQA, "num_hidden_layers": 3},
    "llama-mqa": {"num_attention_heads": 4, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "llama-head-dim": {"head_dim": 24},
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "llama-theta": theta(130000.0),
    "llama-theta-small": theta(731.5),
    "llama-linear": rope("linear", 4.0),
    "llama-dynamic": rope("dynamic", 2.0),
    "llama-dynamic-long": {**rope("dynamic", 3.0), "max_position_embeddings": 128},
    "llama-llama3": {"rope_parameters": LLAMA3, "head_dim": 32},
    "llama-yarn": yarn(),
    "llama-yarn-options": yarn(beta_fast=4.0, beta_slow=2.0, attention_factor=1.3),
    "llama-older-spelling": {**rope("linear", 2.0, 5000.0), **OLDER},
    "llama-bfloat16": {"save": {"dtype": "bfloat16", "max_shard_size": "20KB"}},
    "llama-float16": {**TIED, "save": {"dtype": "float16"}},
    "qwen3-untied": {},
    "qwen3-tied": TIED,
    "qwen3-gqa": {**GQA, "head_dim": 32, "num_hidden_layers": 3, **theta(1000000.0)},
    "qwen3-bias": {"attention_bias": True},
    "qwen3-yarn": yarn(),
    "qwen3-older-spelling": {**theta(1000000.0), **OLDER},
    "qwen3-sliding": {**SLIDING, "num_hidden_layers": 3},
    "mistral-window": {"sliding_window": 24, **GQA},
    "mistral-no-window": {"sliding_window": None, "head_dim": 24, **theta(1000000.0)},
    "mistral-older-spelling": {"sliding_window": 48, **OLDER},
    "qwen2-untied": {**GQA},
    "qwen2-tied": {**TIED, **theta(1000000.0)},
    "qwen2-yarn": {**yarn(), **OLDER},
    "qwen2-sliding": {**SLIDING, "num_hidden_layers": 3, "sliding_window": 24},
    "gemma-tied": GEMMA,
    "gemma-mqa": {**GEMMA, "num_attention_heads": 4, "num_key_value_heads": 1},
    "gemma-gelu": {**GEMMA, "hidden_act": "gelu", "tie_word_embeddings": False},
    "gemma2-capped": {**GEMMA2, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    "gemma2-uncapped": {
        **GEMMA2,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "num_hidden_layers": 4,
        **GQA,
    },
    "gemma2-bias": {**GEMMA2, "attention_bias": True, "num_hidden_layers": 2},
    "gemma3_text-pattern": {**GEMMA2, "rope_parameters": GEMMA3_ROPE, "num_hidden_layers": 8},
    "gemma3_text-linear": {
        **GEMMA2,
        "rope_parameters": {**GEMMA3_ROPE, "full_attention": STRETCHED},
        "num_hidden_layers": 6,
        **GQA,
    },
    "gemma3_text-types": {
        **GEMMA2,
        "rope_parameters": GEMMA3_ROPE,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    },
    "olmo2-untied": theta(500000.0),
    "olmo2-tied": {**TIED, "num_attention_heads": 4, "num_key_value_heads": 1},
    "olmo2-bias": {**HEADS, **yarn(), "attention_bias": True, "save": {"bias": 0.25}},
    "olmo2-older-spelling": {**rope("linear", 4.0), **OLDER},
    "olmo3-pattern": {"num_hidden_layers": 6},
    "olmo3-yarn": {"rope_parameters": OLMO3_YARN, **HEADS, **OLDER},
    "olmo3-tied": {**TIED, "attention_bias": True, "sliding_window": 48},
    "olmo3-types": {
        "rope_parameters": {"sliding_attention": OLMO3_LOCAL, "full_attention": OLMO3_LOCAL},
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 3,
    },
    "gpt2-tied": {},
    "gpt2-untied": {"tie_word_embeddings": False, "n_inner": 48},
    "gpt2-by-layer": {"scale_attn_by_inverse_layer_idx": True, **OLDER},
    "gpt2-gelu": {"scale_attn_weights": False, "activation_function": "gelu", "n_embd": 24},
    "gpt2-published": {"layer_norm_epsilon": 1e-3, "save": {"spelling": "older", "bare": True}},
    "gpt_oss-untied": yarn(truncate=False),
    "gpt_oss-tied": {**TIED, **yarn(beta_fast=4.0), "attention_bias": False},
    "gpt_oss-clipped": {
        **theta(150000.0), "swiglu_limit": 1.0, "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "gpt_oss-mxfp4": {
        **GQA, **yarn(truncate=False), "intermediate_size": 32, "num_local_experts": 4,
        "save": {"spelling": "older", "dtype": "bfloat16", "mxfp4": True},
    },
    "deepseek_v3-groups": {"num_experts_per_tok": 3},
    "deepseek_v3-half": {
        **TIED, "rope_interleave": False, "norm_topk_prob": False, "rms_norm_eps": 1e-3,
    },
    "deepseek_v3-yarn": {
        **yarn(mscale=1.0, mscale_all_dim=0.5, beta_fast=2.0), "q_lora_rank": None, **OLDER,
    },
    "deepseek_v3-bias": {**yarn(mscale=1.0, mscale_all_dim=1.0), "attention_bias": True},
    "deepseek_v3-kimi": {
        **yarn(mscale=1.0, mscale_all_dim=1.0, beta_fast=1.0, beta_slow=1.0), "n_group": 1,
        "topk_group": 1, "n_shared_experts": 1, "routed_scaling_factor": 2.827, **OLDER,
    },
    "deepseek_v2-lora": {"routed_scaling_factor": 1.5},
    "deepseek_v2-lite": {
        "q_lora_rank": None, **yarn(mscale=0.707, mscale_all_dim=0.707), "n_group": 1,
        "topk_group": 1, **OLDER,
    },
    "deepseek_v2-groups": {
        **LIMITED, **yarn(mscale=1.0, mscale_all_dim=0.5), "num_experts_per_tok": 3,
        "routed_scaling_factor": 4.0,
    },
    "deepseek_v2-tied": {
        **TIED, "attention_bias": True, "first_k_dense_replace": 0, "rms_norm_eps": 1e-3,
    },
    "mixtral-untied": {},
    "mixtral-tied": {**TIED, **yarn(), "head_dim": 8, "num_experts_per_tok": 3},
    "mixtral-window": {"sliding_window": 24, "head_dim": 24},
    "mixtral-older-spelling": {
        **theta(10000.0), "save": {"spelling": "older", "max_shard_size": "40KB"},
    },
    "qwen3_moe-untied": {"num_key_value_heads": 1},
    "qwen3_moe-tied": {**TIED, "norm_topk_prob": False, "num_experts_per_tok": 3},
    "qwen3_moe-every-other": {"decoder_sparse_step": 2, "num_hidden_layers": 4, **yarn()},
    "qwen3_moe-mlp-only": {
        "mlp_only_layers": [1], "num_hidden_layers": 3, "attention_bias": True, **OLDER,
    },
    "qwen3_moe-window": {"use_sliding_window": True, "sliding_window": 24},
    "llama4_text-scout": {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}, **OLDER},
    "llama4_text-llama3": {"rope_parameters": LLAMA3, "attention_bias": True, **TIED},
    "llama4_text-maverick": {"use_qk_norm": False, "interleave_moe_layer_step": 2, **OLDER},
    "llama4_text-no-rope": {
        "no_rope_layers": [1, 0, 0, 1], "attn_temperature_tuning": False, "moe_layers": [0, 3],
        "num_experts_per_tok": 2,
    },
    "qwen3_next-untied": theta(10000000.0),
    "qwen3_next-tied": {**TIED, **theta(10000.0), "norm_topk_prob": False, **OLDER},
    "qwen3_next-types": {
        **yarn(partial_rotary_factor=0.5), "linear_conv_kernel_dim": 3,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "mlp_only_layers": [1], "num_hidden_layers": 3, "attention_bias": True,
    },
    "qwen3_next-every-other": {
        "decoder_sparse_step": 2, "linear_num_key_heads": 4, **theta(10000.0),
        "layer_types": ["linear_attention", "full_attention"] * 2, **OLDER,
    },
}  # fmt: skip
