"""The tensor names that most decoder-only checkpoints share, as weight rules for the parts in this
room."""

from collections.abc import Mapping

from ropewalk.core.weights import COPY, LINEAR, LINEAR_OUT, VECTOR, Rule

PRE_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
ALL_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def decoder_rules(gguf_pairs: str = "", norms: Mapping[str, str] = PRE_NORMS) -> tuple[Rule, ...]:
    """Rules for embedding, attention, gated MLP, norms and head; `gguf_pairs` is what GGUF files do
    to query and key, `norms` the names of a layer's norms in theirs and in our words."""
    layer = "model.layers.{i}"

    def linear(theirs: str, ours: str, op=LINEAR, gguf: str = "") -> tuple[Rule, Rule]:
        bias = COPY if op is LINEAR_OUT else VECTOR
        return (
            Rule(f"{layer}.{theirs}.weight", f"layers.*.{ours}.weight", op, gguf),
            Rule(f"{layer}.{theirs}.bias", f"layers.*.{ours}.bias", bias, gguf),
        )

    return (
        Rule("model.embed_tokens.weight", "embed.weight"),
        *linear("self_attn.q_proj", "attention.query", gguf=gguf_pairs),
        *linear("self_attn.k_proj", "attention.key", gguf=gguf_pairs),
        *linear("self_attn.v_proj", "attention.value"),
        *linear("self_attn.o_proj", "attention.out", LINEAR_OUT),
        *linear("mlp.gate_proj", "mlp.gate"),
        *linear("mlp.up_proj", "mlp.up"),
        *linear("mlp.down_proj", "mlp.down"),
        Rule(f"{layer}.self_attn.q_norm.weight", "layers.*.attention.query_norm.scale"),
        Rule(f"{layer}.self_attn.k_norm.weight", "layers.*.attention.key_norm.scale"),
        *(
            Rule(f"{layer}.{theirs}.weight", f"layers.*.{ours}.scale")
            for theirs, ours in norms.items()
        ),
        Rule("model.norm.weight", "final_norm.scale"),
        Rule("lm_head.weight", "head.weight", LINEAR, tied="model.embed_tokens.weight"),
    )
