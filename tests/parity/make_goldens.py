"""Writes the parity goldens: tiny random models and what `transformers` computes with them.

Runs in an environment of its own (README.md beside this file), never in the project's. Knows
nothing of Ropewalk: each golden is the directory that `save_pretrained` writes, and beside it

* `expected.safetensors`: `tokens [2,320]` int32, `positions [p]` int32, `logits [2,p,v]` float32
  (of all positions, those listed) and, unless the variant says otherwise, `continuation [2,16]`
  int32: the greedy tokens after the whole of `tokens`;
* `config.other.json`: the same config in the spelling that `config.json` does not use.

usage: make_goldens.py [NAME ...]      without names: every golden
"""

import copy
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

GOLDENS = Path(__file__).parent / "goldens"
BATCH, LENGTH, NEW, VOCAB = 2, 320, 16, 128
POSITIONS = [*range(0, LENGTH - 16, 8), *range(LENGTH - 16, LENGTH)]
WEIGHT_STD, SCALE_STD = 0.2, 0.3  # far from flat logits; norm scales far from one
MARGIN = 0.02  # between the two best logits of every greedy step: rounding cannot swap them
FAMILIES = {
    "llama": LlamaConfig, "qwen3": Qwen3Config, "mistral": MistralConfig, "qwen2": Qwen2Config,
    "gemma": GemmaConfig, "gemma2": Gemma2Config, "gemma3_text": Gemma3TextConfig,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip


def rope(kind: str, factor: float, theta: float = 10000.0) -> dict:
    """RoPE parameters of a type that takes a factor and nothing more."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, "factor": factor}}


def theta(value: float) -> dict:
    """RoPE without scaling at a base of its own."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}


BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN3 = {"head_dim": 16, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
GQA = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {"head_dim": 16, "tie_word_embeddings": True}
GEMMA2 = {**GEMMA, "sliding_window": 24, "query_pre_attn_scalar": 24, "num_hidden_layers": 3}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA3_ROPE = {"sliding_attention": LOCAL, "full_attention": {**LOCAL, "rope_theta": 1000000.0}}
STRETCHED = {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1}

# What differs from BASE. `save` is not config: how the directory is written.
VARIANTS: dict[str, dict] = {
    "llama-untied": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-gqa": {**GQA, "num_hidden_layers": 3},
    "llama-mqa": {"num_attention_heads": 4, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "llama-head-dim": {"head_dim": 24},
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "llama-theta": theta(130000.0),
    "llama-theta-small": theta(731.5),
    "llama-linear": rope("linear", 4.0),
    "llama-dynamic": rope("dynamic", 2.0),
    "llama-dynamic-long": {**rope("dynamic", 2.0), "max_position_embeddings": 128},
    "llama-llama3": {"rope_parameters": LLAMA3, "head_dim": 32},
    "llama-yarn": {"rope_parameters": YARN},
    "llama-yarn-options": {
        "rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
    },
    "llama-older-spelling": {**rope("linear", 2.0, 5000.0), "save": {"spelling": "older"}},
    "llama-bfloat16": {"save": {"dtype": "bfloat16", "max_shard_size": "20KB"}},
    "llama-float16": {"tie_word_embeddings": True, "save": {"dtype": "float16"}},
    "qwen3-untied": {},
    "qwen3-tied": {"tie_word_embeddings": True},
    "qwen3-gqa": {**GQA, "head_dim": 32, "num_hidden_layers": 3, **theta(1000000.0)},
    "qwen3-bias": {"attention_bias": True},
    "qwen3-yarn": {"rope_parameters": YARN},
    "qwen3-older-spelling": {**theta(1000000.0), "save": {"spelling": "older"}},
    "mistral-window": {"sliding_window": 24, **GQA},
    "mistral-no-window": {"sliding_window": None, "head_dim": 24, **theta(1000000.0)},
    "mistral-older-spelling": {"sliding_window": 48, "save": {"spelling": "older"}},
    "qwen2-untied": {**GQA},
    "qwen2-tied": {"tie_word_embeddings": True, **theta(1000000.0)},
    "qwen2-yarn": {"rope_parameters": YARN, "save": {"spelling": "older"}},
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
    "qwen3-sliding": {**SLIDING, "num_hidden_layers": 3},
}
# Past max_position_embeddings, dynamic RoPE moves the base at every step while old keys stay as
# they were cached: what it generates depends on how it was fed, so there is no one right answer.
NO_CONTINUATION = {"llama-dynamic-long"}


def build(family: str, values: dict, seed: int) -> torch.nn.Module:
    """A float32 model with every parameter drawn anew: transformers' own start is nearly flat."""
    base = {**BASE, **QWEN3} if family == "qwen3" else BASE
    config = FAMILIES[family](**{**base, **values})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        one = 0.0 if family.startswith("gemma") else 1.0  # Gemma's scales are stored around one
        scale = "norm" in name
        parameter.data = one + SCALE_STD * noise if scale else WEIGHT_STD * noise
    return model


def greedy(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Greedy tokens [b,NEW] with a cache, and the smallest lead of a best logit over the next."""
    cache, step, chosen, margin = None, tokens, [], float("inf")
    for _ in range(NEW):
        out = model(step, past_key_values=cache, use_cache=True)
        best = out.logits[:, -1].topk(2)
        margin = min(margin, (best.values[:, 0] - best.values[:, 1]).min().item())
        cache, step = out.past_key_values, best.indices[:, :1]
        chosen.append(step)
    return torch.cat(chosen, dim=1), margin


def other_spelling(config: dict) -> dict:
    """The config as transformers 4 wrote it: RoPE at the top level, `torch_dtype`."""
    older = {key: value for key, value in config.items() if key not in ("dtype", "layer_types")}
    parameters = dict(older.pop("rope_parameters"))
    if "sliding_attention" in parameters:
        older["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = dict(parameters["full_attention"])
        older["layer_types"] = config["layer_types"]
    older["torch_dtype"] = config["dtype"]
    older["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    if kind == "default":
        older["rope_scaling"] = None
    else:  # the oldest files say `type`, the later ones `rope_type`: linear shows the oldest
        oldest = kind == "linear" and "rope_local_base_freq" not in older
        older["rope_scaling"] = {"type" if oldest else "rope_type": kind, **parameters}
    return dict(sorted(older.items()))


def check_spelling(directory: Path, config: dict) -> None:
    """Stops unless transformers reads both spellings of the directory's config alike."""
    keys = ("rope_parameters", "dtype", "layer_types", "head_dim", "tie_word_embeddings")
    first = AutoConfig.from_pretrained(directory).to_dict()
    second = FAMILIES[config["model_type"]].from_dict(copy.deepcopy(config)).to_dict()
    for key in keys:
        ours, theirs = first.get(key), second.get(key)
        if isinstance(ours, dict):
            ours, theirs = ({k: v for k, v in d.items() if k != "type"} for d in (ours, theirs))
        if ours != theirs:
            raise SystemExit(f"{directory.name}: spellings disagree on {key}: {ours} {theirs}")


def save(model: torch.nn.Module, directory: Path, how: dict) -> torch.nn.Module:
    """Writes the directory and returns the model that transformers reads from it, in float32."""
    shutil.rmtree(directory, ignore_errors=True)
    dtype = getattr(torch, how.get("dtype", "float32"))
    shards = {"max_shard_size": how["max_shard_size"]} if "max_shard_size" in how else {}
    model.to(dtype).save_pretrained(directory, **shards)
    (directory / "generation_config.json").unlink(missing_ok=True)
    path = directory / "config.json"
    newer = json.loads(path.read_text())
    older = other_spelling(newer)
    check_spelling(directory, older)
    first, second = (older, newer) if how.get("spelling") == "older" else (newer, older)
    path.write_text(json.dumps(first, indent=2) + "\n")
    (directory / "config.other.json").write_text(json.dumps(second, indent=2) + "\n")
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def make(name: str) -> None:
    """One golden: the first seed whose greedy continuation is clear and free of special tokens."""
    values = dict(VARIANTS[name])
    how = values.pop("save", {})
    number = list(VARIANTS).index(name)
    for seed in range(1000 * number, 1000 * number + 1000):
        model = save(build(name.split("-")[0], values, seed), GOLDENS / name, how)
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
        logits = model(tokens).logits
        exact = copy.deepcopy(model).double()(tokens).logits  # now: dynamic RoPE keeps state
        continuation, margin = greedy(model, tokens)
        if margin >= MARGIN and int(continuation.min()) >= 3:
            break
    else:
        raise SystemExit(f"{name}: no seed gives a clear continuation")
    arrays = {
        "tokens": tokens.to(torch.int32),
        "positions": torch.tensor(POSITIONS, dtype=torch.int32),
        "logits": logits[:, POSITIONS].contiguous(),
    }
    if name not in NO_CONTINUATION:
        arrays["continuation"] = continuation.to(torch.int32)
    save_file(arrays, GOLDENS / name / "expected.safetensors")
    rounding = (exact - logits).abs().max().item()
    print(
        f"{name:22} seed {seed:6} logits std {logits.std():.2f} max {logits.abs().max():.1f} "
        f"float32 rounding {rounding:.1e} least margin {margin:.3f}"
    )


if __name__ == "__main__":
    for golden in sys.argv[1:] or VARIANTS:
        make(golden)
