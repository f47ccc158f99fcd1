"""A Hugging Face directory as llama.cpp's converter writes it to a GGUF file, fact by fact."""

import json
from pathlib import Path
from typing import Any

import gguf as ggml
import numpy as np
from safetensors.numpy import load_file

LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
}  # fmt: skip
TWO_NORMS = {"post_attention_layernorm": "ffn_norm"}
FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
KEYS = {
    "num_hidden_layers": "block_count", "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip
# What each converter writes beside KEYS.
OWN_KEYS = {
    "llama": {"rope_theta": "rope.freq_base", "vocab_size": "vocab_size"},
    "qwen2": {"rope_theta": "rope.freq_base"},
    "qwen3": {"rope_theta": "rope.freq_base"},
    "gemma": {},
    "gemma2": {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "sliding_window": "attention.sliding_window",
    },
    "gemma3": {"rope_theta": "rope.freq_base", "sliding_window": "attention.sliding_window"},
}


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """What the converter does to the rows of a llama's queries and keys."""
    rows = array.shape[0]
    return (
        array.reshape(heads, 2, rows // heads // 2, *array.shape[1:])
        .swapaxes(1, 2)
        .reshape(array.shape)
    )


def renamed(name: str, four_norms: bool) -> str:
    """A tensor's name in the file."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{WHOLE[stem]}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{(LAYER | (FOUR_NORMS if four_norms else TWO_NORMS))[part]}.{kind}"


def add(writer: ggml.GGUFWriter, key: str, value: Any) -> None:
    """Writes one number, text or list of flags under a key of the architecture."""
    kinds = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(f"{writer.arch}.{key}", value)


def convert(directory: Path, target: Path, architecture: str, **more: Any) -> Path:
    """Writes the file; `more` are other keys of the architecture, `__` for a dot."""
    config = json.loads((directory / "config.json").read_text())
    writer = ggml.GGUFWriter(target, architecture)
    for ours, theirs in {**KEYS, **OWN_KEYS[architecture]}.items():
        add(writer, theirs, config[ours])
    for key in ("key_length", "value_length"):
        add(writer, f"attention.{key}", config["head_dim"])
    for key, value in more.items():
        add(writer, key.replace("__", "."), value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        for letter, count in heads.items():
            if architecture == "llama" and f".{letter}_proj." in name:
                tensor = interleaved(tensor, count)
        writer.add_tensor(renamed(name, architecture in ("gemma2", "gemma3")), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
