"""Writes the parity goldens: tiny random models and what `transformers` computes with them.

Runs in an environment of its own (README.md beside this file), never in the project's. Knows
nothing of Ropewalk: each golden is the directory that `save_pretrained` writes, and beside it

* `expected.safetensors`: `tokens [2,320]` int32, `positions [p]` int32, `logits [2,p,v]` float32
  (of all positions, those listed) and, unless the variant says otherwise, `continuation [2,64]`
  int32: the greedy tokens after the whole of `tokens`;
* `config.other.json`: the same config in the spelling that `config.json` does not use.

usage: make_goldens.py [NAME ...]      without names: every golden
"""

import copy
import json
import shutil
import sys
import zlib
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from variants import VARIANTS, VOCAB, start

GOLDENS = Path(__file__).parent / "goldens"
BATCH, LENGTH, NEW = 2, 320, 64
POSITIONS = [*range(0, LENGTH - 16, 8), *range(LENGTH - 16, LENGTH)]
WEIGHT_STD, SCALE_STD = 0.2, 0.3  # far from flat logits; norm scales far from one
# What float32 is off from float64 by, at most: a third of what the tests allow.
ROUNDING = 3e-5
# Least lead of the best logit in every greedy step. It may be as low as this because it is still
# more than sixty times ROUNDING, so rounding cannot swap the two.
MARGIN = 2e-3
# Least lead of the last expert (or group) that is chosen over the first that is not: a swapped
# expert is a jump in the logits, and no error of whoever computes them.
CHOICE = 1e-4
VARIETY = 12  # different tokens in every continuation: a cache of no effect must show
TAKEN = 5  # tokens of the prompts that every expert of every layer has at least
FAMILIES = {
    "llama": "Llama", "qwen3": "Qwen3", "mistral": "Mistral", "qwen2": "Qwen2",
    "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text", "olmo2": "Olmo2",
    "olmo3": "Olmo3", "gpt2": "GPT2", "gpt_oss": "GptOss", "deepseek_v3": "DeepseekV3",
    "deepseek_v2": "DeepseekV2", "mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe",
    "llama4_text": "Llama4Text", "qwen3_next": "Qwen3Next",
}  # fmt: skip
# Past max_position_embeddings, dynamic RoPE moves the base at every step while old keys stay as
# they were cached: what it generates depends on how it was fed, so there is no one right answer.
NO_CONTINUATION = {"llama-dynamic-long"}

EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}

# Keys that published files carry and that `transformers` does not read.
DEEPSEEK = {"ep_size": 1, "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True}
PUBLISHED = {
    "deepseek_v2": {**DEEPSEEK, "scoring_func": "softmax"},
    "deepseek_v3": {**DEEPSEEK, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "gpt_oss": {"initial_context_length": 128, "experts_per_token": 2},
    "gpt2": {"n_ctx": 400, "task_specific_params": {"text-generation": {"max_length": 50}}},
    "qwen3_moe": {"max_window_layers": 2}, "qwen3_next": {"use_sliding_window": False},
    "llama4_text": {"for_llm_compressor": False},
}  # fmt: skip
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1; the fourth bit is the sign
MXFP4 = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
    "quant_method": "mxfp4",
}  # fmt: skip


def config_class(family: str) -> type:
    """The config class of `transformers` for the family."""
    return getattr(transformers, f"{FAMILIES[family]}Config")


def draw(name: str, noise: torch.Tensor, around_zero: bool) -> torch.Tensor:
    """A parameter's value from standard normal noise of its shape."""
    parts = name.split(".")
    if parts[-1] == "sinks":  # as large as a row's strongest logits, else a sink takes nothing
        return 2 + 2 * noise
    if parts[-1] == "A_log":  # from heads that forget within tokens to heads that remember all
        return -3 + noise
    if parts[-1] == "e_score_correction_bias":  # as wide as the scores that it is added to
        return SCALE_STD * noise
    if parts[-1] == "weight" and ("norm" in parts[-2] or parts[-2].startswith("ln_")):
        one = 0.0 if around_zero and parts[-3] != "linear_attn" else 1.0
        if name in ("model.norm.weight", "transformer.ln_f.weight"):
            return one - 1 + noise  # of either sign: else a tied head repeats the token it is fed
        return one + SCALE_STD * noise
    return WEIGHT_STD * noise


def build(family: str, values: dict, how: dict, seed: int) -> tuple[torch.nn.Module, dict]:
    """A float32 model with every parameter drawn anew: transformers' own start is nearly flat.

    Its values are those that the file will hold; the second result has the tensors that the file
    holds in MXFP4, by name.
    """
    config = config_class(family)(**{**start(family), **values})
    model = AutoModelForCausalLM.from_config(config, **EAGER).float().eval()
    dtype = getattr(torch, how.get("dtype", "float32"))
    generator = torch.Generator().manual_seed(seed)
    # Gemma's and Qwen3-Next's scales are stored around zero, the latter's gated norm apart.
    around_zero = family.startswith("gemma") or family == "qwen3_next"
    tensors = [*model.named_parameters(), *model.named_buffers()]
    stored, packed = model.state_dict(), {}
    for name, tensor in tensors:
        if name not in stored:
            continue
        if how.get("mxfp4") and name.endswith("_proj") and "experts" in name:
            blocks, scales, tensor.data = draw_mxfp4(tensor.shape, generator)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(".bias"):  # full biases drown what a norm after attention sees
                noise *= how.get("bias", 1.0)
            tensor.data = draw(name, noise, around_zero).to(dtype).float()
    return model, packed


def draw_mxfp4(
    shape: torch.Size, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks [e,out,in/32,16] and scales [e,out,in/32] uint8, and the weight [e,in,out] they mean.

    A byte holds two values, the low half first; a scale is an exponent of two, biased by 127.
    """
    experts, inputs, outputs = shape
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator)
    scales = torch.randint(122, 125, blocks.shape[:-1], generator=generator)
    codes = torch.stack([blocks % 16, blocks // 16], dim=-1).flatten(-2)
    signed = torch.tensor([*FP4, *(-value for value in FP4)])[codes]
    weight = (signed * 2.0 ** (scales[..., None] - 127)).flatten(-2).transpose(1, 2)
    return blocks.to(torch.uint8), scales.to(torch.uint8), weight.contiguous()


def gap(scores: torch.Tensor, count: int) -> float:
    """The least lead, over all rows, of the count-th largest score over the next."""
    if count == scores.shape[-1]:
        return float("inf")
    values = scores.topk(count + 1).values
    return (values[:, -2] - values[:, -1]).min().item()


def choose(router: torch.nn.Module, logits: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The experts [t,k] that a router takes at these logits [t,e], and the least lead of any."""
    bias = getattr(router, "e_score_correction_bias", None)
    scores = logits if bias is None else logits.sigmoid() + bias
    groups = getattr(router, "num_group", None)
    least = float("inf")
    if groups and getattr(router, "topk_method", None) != "greedy":
        grouped = scores.unflatten(-1, (groups, -1))
        best = grouped.amax(-1) if bias is None else grouped.topk(2).values.sum(-1)
        least = gap(best, router.topk_group)
        kept = torch.zeros_like(best).scatter(1, best.topk(router.topk_group).indices, 1.0)
        scores = grouped.masked_fill(kept[..., None] == 0, float("-inf")).flatten(-2)
    return scores.topk(router.top_k).indices, min(least, gap(scores, router.top_k))


class Routes:
    """Watches a model's routers: how often each expert was taken, and how clearly."""

    def __init__(self, model: torch.nn.Module):
        self.taken: dict[str, torch.Tensor] = {}
        self.least = float("inf")
        for name, module in model.named_modules():
            if type(module).__name__.endswith("Router"):
                module.register_forward_hook(self.hook(name))

    def hook(self, name: str):
        """What a router calls with its outputs; logits [t,e] are the first, or Llama 4's last."""

        def seen(router: torch.nn.Module, _: tuple, outputs: tuple) -> None:
            logits = outputs[-1] if len(outputs) == 2 else outputs[0]
            experts, least = choose(router, logits)
            if len(outputs) == 3 and not torch.equal(
                outputs[2].sort().values, experts.sort().values
            ):
                raise SystemExit(f"{name} does not choose as it is described here")
            self.least = min(self.least, least)
            counts = experts.flatten().bincount(minlength=logits.shape[-1])
            self.taken[name] = self.taken.get(name, 0) + counts

        return seen

    def clear(self) -> bool:
        """Whether every expert was taken often enough and no choice was near another."""
        return self.least >= CHOICE and all(n.min() >= TAKEN for n in self.taken.values())


def greedy(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, float] | None:
    """Greedy tokens [b,NEW] with a cache, and the smallest lead of a best logit over the next.

    None where a lead is below MARGIN, a token is a special one, or they are too much the same.
    """
    cache, step, chosen, margin = None, tokens, [], float("inf")
    for _ in range(NEW):
        out = model(step, past_key_values=cache, use_cache=True)
        best = out.logits[:, -1].topk(2)
        margin = min(margin, (best.values[:, 0] - best.values[:, 1]).min().item())
        cache, step = out.past_key_values, best.indices[:, :1]
        chosen.append(step)
        if margin < MARGIN or int(step.min()) < 3:
            return None
    tokens = torch.cat(chosen, dim=1)
    varied = all(len(row.unique()) >= VARIETY for row in tokens)
    return (tokens, margin) if varied else None


def other_spelling(config: dict) -> dict:
    """The config as transformers 4 or its publisher wrote it: RoPE at the top level and so on."""
    family = config["model_type"]
    older = {key: value for key, value in config.items() if key not in ("dtype", "layer_types")}
    older |= {"torch_dtype": config["dtype"], **PUBLISHED.get(family, {})}
    if family == "gpt2":
        new = ("scale_attn", "reorder", "n_inner", "tie_word", "add_cross", "use_cache")
        default = config_class(family)().to_dict()
        kept = {k: v for k, v in older.items() if not (k.startswith(new) and v == default[k])}
        return dict(sorted(kept.items()))
    if family in ("gemma3_text", "olmo3", "gpt_oss"):
        older["layer_types"] = config["layer_types"]
    elif family == "qwen3_next":
        older |= layers_of_qwen3_next(config["layer_types"])
    elif family == "llama4_text":
        older |= layers_of_llama4(older)
    elif family == "qwen3_moe":
        older["num_experts"] = older.pop("num_local_experts")
    elif family.startswith("deepseek"):  # derived, and absent from published files
        del older["head_dim"], older["qk_head_dim"]
    parameters = dict(older.pop("rope_parameters"))
    if "sliding_attention" in parameters:
        if family == "gemma3_text":
            older["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = dict(parameters["full_attention"])
    older["rope_theta"] = parameters.pop("rope_theta")
    if family == "qwen3_next":
        older["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    kind = parameters.pop("rope_type")
    if kind == "default":  # without the key, gpt_oss has YaRN
        older["rope_scaling"] = {"rope_type": kind} if family == "gpt_oss" else None
    else:  # the oldest files say `type`, the later ones `rope_type`
        oldest = (kind == "linear" and family != "gemma3_text") or family.startswith("deepseek")
        older["rope_scaling"] = {"type" if oldest else "rope_type": kind, **parameters}
    return dict(sorted(older.items()))


def layers_of_qwen3_next(types: list[str]) -> dict:
    """How an older config says which layers attend: by an interval where there is one."""
    every = types.index("full_attention") + 1
    regular = [("linear", "full")[(i + 1) % every == 0] + "_attention" for i in range(len(types))]
    return {"full_attention_interval": every} if types == regular else {"layer_types": types}


def layers_of_llama4(config: dict) -> dict:
    """How an older config says which layers have RoPE and experts: not at all where regular."""
    count, step = config["num_hidden_layers"], config["interleave_moe_layer_step"]
    every = config["no_rope_layer_interval"]
    regular = config["no_rope_layers"] == [int((i + 1) % every != 0) for i in range(count)]
    stepped = config["moe_layers"] == list(range(step - 1, count, step))
    return {
        "no_rope_layers": [] if regular else config["no_rope_layers"],
        "moe_layers": None if stepped else config["moe_layers"],
    }


def check_spelling(directory: Path, config: dict) -> None:
    """Stops unless transformers reads both spellings of the directory's config alike."""
    first = AutoConfig.from_pretrained(directory).to_dict()
    second = config_class(config["model_type"]).from_dict(copy.deepcopy(config)).to_dict()
    for key, ours in first.items():
        theirs = second.get(key)
        if isinstance(ours, dict):
            ours, theirs = ({k: v for k, v in d.items() if k != "type"} for d in (ours, theirs))
        if ours != theirs and key != "_name_or_path":
            raise SystemExit(f"{directory.name}: spellings disagree on {key}: {ours} {theirs}")


def rewrite(path: Path, how: dict, packed: dict) -> None:
    """Gives the weights the form in which they are published, where `save_pretrained` has none."""
    tensors = load_file(path)
    if how.get("mxfp4"):
        tensors = {k: v for k, v in tensors.items() if f"{k}_blocks" not in packed} | packed
    if how.get("bare"):  # GPT-2's own files: no prefix, and the causal mask (here smaller) beside
        tensors = {key.removeprefix("transformer."): value for key, value in tensors.items()}
        layers = [key.removesuffix(".ln_1.weight") for key in tensors if "ln_1.weight" in key]
        mask = torch.ones(8, 8).tril()[None, None]
        tensors |= {f"{layer}.attn.bias": mask.clone() for layer in layers}
    save_file(dict(sorted(tensors.items())), path, metadata={"format": "pt"})


def save(model: torch.nn.Module, directory: Path, how: dict, packed: dict) -> torch.nn.Module:
    """Writes the directory and returns the model that transformers reads from it, in float32."""
    shutil.rmtree(directory, ignore_errors=True)
    dtype = getattr(torch, how.get("dtype", "float32"))
    shards = {"max_shard_size": how["max_shard_size"]} if "max_shard_size" in how else {}
    model.to(dtype).save_pretrained(directory, **shards)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if how.get("mxfp4") or how.get("bare"):
        rewrite(directory / "model.safetensors", how, packed)
    path = directory / "config.json"
    newer = json.loads(path.read_text())
    if how.get("mxfp4"):
        newer["quantization_config"] = MXFP4
        path.write_text(json.dumps(newer))
    older = other_spelling(newer)
    check_spelling(directory, older)
    first, second = (older, newer) if how.get("spelling") == "older" else (newer, older)
    path.write_text(json.dumps(first, indent=2) + "\n")
    (directory / "config.other.json").write_text(json.dumps(second, indent=2) + "\n")
    read, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **EAGER
    )
    if wrong := {key: value for key, value in info.items() if value}:
        raise SystemExit(f"{directory.name}: transformers cannot read what it wrote: {wrong}")
    return read.eval()


def attempt(
    name: str, model: torch.nn.Module, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, str] | None:
    """Logits, continuation, and a line about them; None where a choice is not clear."""
    routes = Routes(model)
    logits = model(tokens).logits
    if not routes.clear():
        return None
    rarest = min((int(n.min()) for n in routes.taken.values()), default=0)
    exact = copy.deepcopy(model).double()(tokens).logits  # now: dynamic RoPE keeps state
    rounding = (exact - logits).abs().max().item()
    found = greedy(model, tokens)
    if found is None or not routes.clear() or rounding > ROUNDING:
        return None
    continuation, margin = found
    if name not in NO_CONTINUATION:  # the cache and one pass over everything agree
        whole = model(torch.cat([tokens, continuation[:, :-1]], dim=1)).logits
        if not torch.equal(whole[:, LENGTH - 1 :].argmax(-1), continuation):
            raise SystemExit(f"{name}: transformers' cache and its full pass disagree")
    line = f"logits std {logits.std():.2f} rounding {rounding:.1e} least margin {margin:.1e}"
    if routes.taken:
        line += f" choice {routes.least:.1e} rarest expert {rarest}"
    return logits, continuation, line


@torch.no_grad()
def make(name: str) -> None:
    """One golden: the first seed at which every choice, of token or expert, is clear."""
    values = dict(VARIANTS[name])
    how = values.pop("save", {})
    first = zlib.crc32(name.encode())
    for seed in range(first, first + 5000):
        model, packed = build(name.split("-")[0], values, how, seed)
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
        if (found := attempt(name, model, tokens)) is not None:
            break
    else:
        raise SystemExit(f"{name}: no seed gives a clear continuation")
    logits, continuation, line = found
    read = save(model, GOLDENS / name, how, packed)
    if (read(tokens).logits - logits).abs().max() > ROUNDING:
        raise SystemExit(f"{name}: what was written is not what was computed")
    arrays = {
        "tokens": tokens.to(torch.int32),
        "positions": torch.tensor(POSITIONS, dtype=torch.int32),
        "logits": logits[:, POSITIONS].contiguous(),
    }
    if name not in NO_CONTINUATION:
        arrays["continuation"] = continuation.to(torch.int32)
    save_file(arrays, GOLDENS / name / "expected.safetensors")
    print(f"{name:24} seed +{seed - first:<4} {line}", flush=True)


if __name__ == "__main__":
    for golden in sys.argv[1:] or VARIANTS:
        make(golden)
