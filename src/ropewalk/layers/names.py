"""The tensor names that most decoder-only checkpoints share, as weight rules for the parts in this
room."""

from collections.abc import Mapping

from ropewalk.core.weights import COPY, FLAT, FLAT_IN, LINEAR, LINEAR_OUT, VECTOR, Fused, Op, Rule

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


_LAYER = "model.layers.{i}"


def decoder_rules(
    gguf_pairs: str = "",
    gguf_norms: str = "",
    norms: Mapping[str, str] = PRE_NORMS,
    mlp: str = "mlp",
) -> tuple[Rule, ...]:
    """Rules for embedding, attention, gated MLP, norms and head; `gguf_pairs` and `gguf_norms` are
    what GGUF files do to query and key and to norms, `norms` the names of a layer's norms in theirs
    and in our words, `mlp` what they call that."""

    def norm(theirs: str, ours: str) -> Rule:
        return Rule(f"{theirs}.weight", f"{ours}.scale", VECTOR, gguf=gguf_norms)

    return (
        Rule("model.embed_tokens.weight", "embed.weight"),
        *linear("self_attn.q_proj", "attention.query", gguf=gguf_pairs),
        *linear("self_attn.k_proj", "attention.key", gguf=gguf_pairs),
        *linear("self_attn.v_proj", "attention.value"),
        *linear("self_attn.o_proj", "attention.out", LINEAR_OUT),
        Rule(f"{_LAYER}.self_attn.sinks", "layers.*.attention.sinks"),
        *gated_rules(mlp, "mlp"),
        norm(f"{_LAYER}.self_attn.q_norm", "layers.*.attention.query_norm"),
        norm(f"{_LAYER}.self_attn.k_norm", "layers.*.attention.key_norm"),
        *(norm(f"{_LAYER}.{theirs}", f"layers.*.{ours}") for theirs, ours in norms.items()),
        norm("model.norm", "final_norm"),
        Rule("lm_head.weight", "head.weight", LINEAR, tied="model.embed_tokens.weight"),
    )


def linear(
    theirs: str, ours: str, op: Op = LINEAR, gguf: str = "", fused: Fused | None = None
) -> tuple[Rule, Rule]:
    """Rules for weight and bias of a product in every layer."""
    bias = COPY if op is LINEAR_OUT else VECTOR
    names = f"{_LAYER}.{theirs}", f"layers.*.{ours}"
    return (
        Rule(f"{names[0]}.weight", f"{names[1]}.weight", op, gguf, fused=fused),
        Rule(f"{names[0]}.bias", f"{names[1]}.bias", bias, gguf, fused=fused),
    )


def gated_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Rules for a gated MLP in every layer."""
    parts = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    return tuple(rule for a, b in parts.items() for rule in linear(f"{theirs}.{a}", f"{ours}.{b}"))


def latent_rules() -> tuple[Rule, ...]:
    """Rules for what latent attention has beside queries and output."""
    attention = f"{_LAYER}.self_attn"
    by_head = {place: Fused(place, groups=lambda shape: shape[0]) for place in (0, 1)}
    up = f"{attention}.kv_b_proj.weight"
    return (
        *linear("self_attn.q_a_proj", "attention.query.down"),
        *linear("self_attn.q_b_proj", "attention.query.up"),
        *linear("self_attn.kv_a_proj_with_mqa", "attention.down"),
        Rule(f"{attention}.q_a_layernorm.weight", "layers.*.attention.query.norm.scale"),
        Rule(f"{attention}.kv_a_layernorm.weight", "layers.*.attention.norm.scale"),
        Rule(up, "layers.*.attention.key_up.weight", FLAT_IN, fused=by_head[0]),
        Rule(up, "layers.*.attention.value_up.weight", FLAT_IN, fused=by_head[1]),
    )


def selection_bias_rule(theirs: str) -> Rule:
    """The rule for what a router adds to its scores in every layer."""
    return Rule(f"{_LAYER}.{theirs}", "layers.*.mlp.router.selection_bias")


def expert_rules(
    router: str = "mlp.gate",
    experts: str = "mlp.experts",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> tuple[Rule, ...]:
    """Rules for a router and experts whose products stand apart in the file."""
    parts = {gate: "gate", up: "up", down: "down"}
    return (
        *linear(router, "mlp.router"),
        *(
            Rule(
                f"{_LAYER}.{experts}.{{e}}.{theirs}.weight", f"layers.*.mlp.experts.{ours}", LINEAR
            )
            for theirs, ours in parts.items()
        ),
    )


def fused_expert_rules(router: str, experts: str, gate: Fused, up: Fused) -> tuple[Rule, ...]:
    """Rules for a router and experts whose products lie together [e, in, out] in the file, gate and
    up in one tensor."""
    theirs, ours = f"{_LAYER}.{experts}", "layers.*.mlp.experts"
    both = f"{theirs}.gate_up_proj", f"{theirs}.gate_up_proj_bias"
    return (
        *linear(router, "mlp.router"),
        *(
            Rule(name, f"{ours}.{part}{end}", fused=place)
            for name, end in zip(both, ("", "_bias"), strict=True)
            for part, place in (("gate", gate), ("up", up))
        ),
        Rule(f"{theirs}.down_proj", f"{ours}.down"),
        Rule(f"{theirs}.down_proj_bias", f"{ours}.down_bias"),
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
