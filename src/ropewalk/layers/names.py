"""The tensor names that most decoder-only checkpoints share, as weight rules for the parts in this
room."""

from collections.abc import Mapping

from ropewalk.core.weights import COPY, FLAT, FLAT_IN, LINEAR, LINEAR_OUT, VECTOR, Fused, Rule

PRE_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
ALL_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
POST_NORMS = {
    "post_attention_layernorm": "attention_post_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def decoder_rules(
    gguf_pairs: str = "", gguf_norms: str = "", norms: Mapping[str, str] = PRE_NORMS
) -> tuple[Rule, ...]:
    """Rules for embedding, attention, gated MLP, norms and head; `gguf_pairs` and `gguf_norms` are
    what GGUF files do to query and key and to norms, `norms` the names of a layer's norms in theirs
    and in our words."""
    layer = "model.layers.{i}"

    def linear(theirs: str, ours: str, op=LINEAR, gguf: str = "") -> tuple[Rule, Rule]:
        bias = COPY if op is LINEAR_OUT else VECTOR
        return (
            Rule(f"{layer}.{theirs}.weight", f"layers.*.{ours}.weight", op, gguf),
            Rule(f"{layer}.{theirs}.bias", f"layers.*.{ours}.bias", bias, gguf),
        )

    def norm(theirs: str, ours: str) -> Rule:
        return Rule(f"{theirs}.weight", f"{ours}.scale", VECTOR, gguf=gguf_norms)

    return (
        Rule("model.embed_tokens.weight", "embed.weight"),
        *linear("self_attn.q_proj", "attention.query", gguf=gguf_pairs),
        *linear("self_attn.k_proj", "attention.key", gguf=gguf_pairs),
        *linear("self_attn.v_proj", "attention.value"),
        *linear("self_attn.o_proj", "attention.out", LINEAR_OUT),
        *linear("mlp.gate_proj", "mlp.gate"),
        *linear("mlp.up_proj", "mlp.up"),
        *linear("mlp.down_proj", "mlp.down"),
        norm(f"{layer}.self_attn.q_norm", "layers.*.attention.query_norm"),
        norm(f"{layer}.self_attn.k_norm", "layers.*.attention.key_norm"),
        *(norm(f"{layer}.{theirs}", f"layers.*.{ours}") for theirs, ours in norms.items()),
        norm("model.norm", "final_norm"),
        Rule("lm_head.weight", "head.weight", LINEAR, tied="model.embed_tokens.weight"),
    )


def gpt_rules() -> tuple[Rule, ...]:
    """Rules for GPT-2's tensors: products stored [in, out], query, key and value in one tensor."""
    layer = "transformer.h.{i}"

    def linear(theirs: str, ours: str, op=FLAT, place: int | None = None) -> tuple[Rule, Rule]:
        weight, bias = (None if place is None else Fused(place, axis) for axis in (1, 0))
        names = f"{layer}.{theirs}", f"layers.*.{ours}"
        return (
            Rule(f"{names[0]}.weight", f"{names[1]}.weight", op, fused=weight),
            Rule(f"{names[0]}.bias", f"{names[1]}.bias", VECTOR, fused=bias),
        )

    def norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
        return Rule(f"{theirs}.weight", f"{ours}.scale"), Rule(f"{theirs}.bias", f"{ours}.bias")

    return (
        Rule("transformer.wte.weight", "embed.weight"),
        Rule("transformer.wpe.weight", "positions.weight"),
        *linear("attn.c_attn", "attention.query", place=0),
        *linear("attn.c_attn", "attention.key", place=1),
        *linear("attn.c_attn", "attention.value", place=2),
        *linear("attn.c_proj", "attention.out", FLAT_IN),
        *linear("mlp.c_fc", "mlp.up"),
        *linear("mlp.c_proj", "mlp.down"),
        *norm(f"{layer}.ln_1", "layers.*.attention_norm"),
        *norm(f"{layer}.ln_2", "layers.*.mlp_norm"),
        *norm("transformer.ln_f", "final_norm"),
        Rule("lm_head.weight", "head.weight", LINEAR, tied="transformer.wte.weight"),
    )
