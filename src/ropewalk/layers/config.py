"""The description of a language model, in the words of Hugging Face's `config.json`, read from and
written to both its spellings."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import pydantic

from ropewalk.core.config import Config
from ropewalk.core.errors import ModelError
from ropewalk.layers import norm, rope

Count = Annotated[int, pydantic.Field(gt=0)]
# Features of a head; rotary positions turn them in pairs.
HeadDim = Annotated[int, pydantic.Field(gt=0, multiple_of=2)]

_COUNT = pydantic.TypeAdapter(Count)

# Keys that cannot change what the model computes from its weights.
_HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures",
    "attention_dropout", "auto_map", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "is_llama_config",
    "label2id", "max_window_layers", "model_type", "name_or_path", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
    "sliding_window", "torch_dtype", "transformers.js_config", "transformers_version",
    "unsloth_fixed", "unsloth_version", "use_cache",
})  # fmt: skip
# Keys that are understood at one value only.
_ONLY = {
    "rope_interleaved": (False, None),
    "use_bidirectional_attention": (False, None),
    "use_sliding_window": (False, None),
    "add_cross_attention": (False, None),
    "quantization_config": (None,),
}


class LMConfig(Config):
    """What every decoder-only family here has in common. Sizes in features, lengths in tokens."""

    architecture: ClassVar[str]
    """the name of Hugging Face's class for it"""
    activations: ClassVar[tuple[str, ...]] = ("silu",)
    """what `hidden_act` may be"""
    spelt: ClassVar[dict[str, str]] = {}
    """what `config.json` calls a field, where it is not its name here"""
    only: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """keys of the family's own that are understood at these values only"""
    harmless: ClassVar[frozenset[str]] = frozenset()
    """keys of the family's own that cannot change what the model computes from its weights"""
    around_one: ClassVar[bool] = False
    """whether norm scales are stored as their distance from one"""
    learned_positions: ClassVar[bool] = False
    """whether a learned vector of its position is added to every embedded token"""
    gguf_architecture: ClassVar[str] = ""
    """what GGUF files call the family; empty where nobody has checked what they say"""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    max_position_embeddings: Count = 2048
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False

    def rotations(self) -> dict[str, rope.Rotation]:
        """By the name that attention layers ask for."""
        return {}

    def routing(self) -> Any:
        """How experts are chosen; None without experts. Raises ValueError where it cannot be."""
        return None

    def norm(self) -> Any:
        """A norm over the hidden features."""
        raise NotImplementedError

    def longest(self) -> int:
        """How many positions a sequence may have."""
        return self.max_position_embeddings

    def unused(self) -> tuple[str, ...]:
        """Patterns of tensors that published files hold beside those of the model."""
        return ()

    def embed_scale(self) -> float | None:
        """A factor on the embedded tokens, rounded to their dtype."""
        return None

    def logit_cap(self) -> float | None:
        """A bound c of the logits: c tanh(logits / c)."""
        return None

    @classmethod
    def said(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values without those that are null where null means nothing."""
        nullable = {
            key for key, f in cls.model_fields.items() if type(None) in get_args(f.annotation)
        }
        return {k: v for k, v in values.items() if v is not None or k in nullable}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _unsaid(cls, values: dict[str, Any]) -> dict[str, Any]:
        return cls.said(values)

    @pydantic.model_validator(mode="after")
    def _known_activation(self) -> Self:
        if self.hidden_act not in self.activations:
            raise ValueError(
                f"hidden_act = {self.hidden_act} is not supported; supported: "
                f"{', '.join(self.activations)}"
            )
        self.routing()
        return self

    @classmethod
    def from_hf(cls, values: dict[str, Any], source: str = "config.json") -> Self:
        """The config that a parsed `config.json` describes.

        Raises ModelError for an unsupported RoPE type or for keys that could change the mathematics
        and are not understood.
        """
        values = cls._read(dict(values), source)
        for ours, theirs in cls.spelt.items():
            said = values.pop(theirs, None)
            if said is not None:
                values[ours] = said
        own = "layer_types" in cls.model_fields
        kinds = None if own else values.pop("layer_types", None)
        if kinds is not None and set(kinds) != {"full_attention"}:
            raise ModelError(
                f"{source}: layer_types has {sorted(set(kinds))}; this family has full_attention "
                "layers only"
            )
        for key, allowed in {**_ONLY, **cls.only}.items():
            if key not in cls.model_fields and values.pop(key, None) not in allowed:
                raise ModelError(
                    f"{source}: `{key}` is set and not supported; supported: {allowed[0]}"
                )
        fields, ignored = cls.model_fields, _HARMLESS | cls.harmless
        known = {key: value for key, value in values.items() if key in fields}
        unknown = [key for key in values if key not in fields and key not in ignored]
        if unknown:
            raise ModelError(
                f"{source}: key `{unknown[0]}` = {values[unknown[0]]!r} is not understood and "
                "could change what the model "
                f"computes; remove it if it does not"
            )
        return cls.parse(known, source)

    @classmethod
    def _read(cls, values: dict[str, Any], source: str) -> dict[str, Any]:
        """The values of a `config.json` in one of its spellings."""
        return values

    @classmethod
    def from_gguf(cls, values: dict[str, Any], source: str) -> Self:
        """The config that a GGUF file describes, `values` being its keys in Hugging Face's words;
        raises as `from_hf`. A family says here what its files leave out."""
        return cls.from_hf(values, source)

    def to_hf(self) -> dict[str, Any]:
        """`config.json` in the spelling that every version of `transformers` reads."""
        values = self.model_dump(mode="json")
        for ours, theirs in self.spelt.items():
            values[theirs] = values.pop(ours)
        return {"architectures": [self.architecture], "model_type": self.family(), **values}

    @classmethod
    def family(cls) -> str:
        """The name of the file that holds this family, which is Hugging Face's `model_type`."""
        return cls.__module__.rpartition(".")[2]


class Positioned(LMConfig):
    """A config of GPT's kind: layer norms, a learned vector for every position, heads that share
    nothing."""

    activations: ClassVar[tuple[str, ...]] = ("gelu_new", "gelu_pytorch_tanh", "gelu")
    learned_positions: ClassVar[bool] = True

    layer_norm_epsilon: float = pydantic.Field(default=1e-5, gt=0)
    tie_word_embeddings: bool = True

    @property
    def num_key_value_heads(self) -> int:
        """Every head of queries has its own."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """A head's share of the hidden features."""
        return self.hidden_size // self.num_attention_heads

    def norm(self) -> norm.LayerNorm:
        """A norm over the hidden features."""
        return norm.LayerNorm(self.hidden_size, eps=self.layer_norm_epsilon)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _derive(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The MLP is by default four times as wide as the residual stream."""
        wide = {"intermediate_size": 4 * (_count(values, "hidden_size") or 1)}
        return {**wide, **cls.said(values)}

    @pydantic.model_validator(mode="after")
    def _divides(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not a multiple of num_attention_heads = "
                f"{self.num_attention_heads}; change one"
            )
        return self


class Rotary(LMConfig):
    """A config of what most families are since: RMS norms and rotary positions."""

    rms_norm_eps: float = pydantic.Field(default=1e-6, gt=0)
    rope_theta: float = pydantic.Field(default=10_000.0, gt=0)
    rope_scaling: rope.Scaling = rope.Default()

    def rotations(self) -> dict[str, rope.Rotation]:
        """By the name that attention layers ask for."""
        return {"default": self.rotation(self.rope_scaling)}

    def longest(self) -> int:
        """A RoPE that grows with the sequence takes more positions than it was trained on."""
        scaling, trained = self.rope_scaling, super().longest()
        return int(trained * scaling.factor) if isinstance(scaling, rope.Dynamic) else trained

    def rotary_dim(self) -> int:
        """How many features of a head are turned."""
        raise NotImplementedError

    def rotation(self, scaling: Any, theta: float | None = None) -> rope.Rotation:
        """That of a head."""
        length = self.max_position_embeddings
        found = scaling.rotation(self.rotary_dim(), theta or self.rope_theta, length)
        return dataclasses.replace(found, interleaved=self.interleaved())

    def interleaved(self) -> bool:
        """Whether features that are turned together are neighbours."""
        return False

    def norm(self) -> norm.RMSNorm:
        """A norm over the hidden features."""
        return norm.RMSNorm(self.hidden_size, eps=self.rms_norm_eps, around_one=self.around_one)

    @pydantic.model_validator(mode="after")
    def _turns(self) -> Self:
        self.rotations()  # raises ValueError where the values of one do not fit the head
        return self

    @classmethod
    def _read(cls, values: dict[str, Any], source: str) -> dict[str, Any]:
        """RoPE's newer spelling folded into the older one."""
        return _plain_rope(values, source)

    def to_hf(self) -> dict[str, Any]:
        """As `LMConfig.to_hf`."""
        values = super().to_hf()
        if values["rope_scaling"]["rope_type"] == "default":
            values["rope_scaling"] = None
        return values


class Grouped(Rotary):
    """A config of attention whose heads of keys are shared by several heads of queries."""

    num_key_value_heads: Count
    head_dim: HeadDim

    def rotary_dim(self) -> int:
        """The whole head."""
        return self.head_dim

    @pydantic.model_validator(mode="before")
    @classmethod
    def _derive(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Heads of keys default to those of queries, and a head to its share of the hidden
        features. What would follow from a value that is refused is not blamed too."""
        values = cls.said(values)
        heads, hidden = _count(values, "num_attention_heads"), _count(values, "hidden_size")
        values.setdefault("num_key_value_heads", heads or 1)
        if "head_dim" not in values and cls.model_fields["head_dim"].is_required():
            if heads and hidden and hidden % heads:
                raise ValueError(
                    f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}; "
                    "change one, or set head_dim"
                )
            values["head_dim"] = hidden // heads if heads and hidden else 2
        return values

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        return self


class Windowed(Grouped):
    """A config of layers of which some see a window of the last keys: every `full_every`-th sees
    all of them, unless `layer_types` says otherwise."""

    full_every: ClassVar[int] = 1

    sliding_window: Count | None = None
    layer_types: tuple[Literal["sliding_attention", "full_attention"], ...] | None = None
    """one a layer"""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _usual(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The usual pattern is the same said or not said."""
        layers = _count(values, "num_hidden_layers") or 0
        if values.get("layer_types") and tuple(values["layer_types"]) == cls.usual_kinds(layers):
            return {key: value for key, value in values.items() if key != "layer_types"}
        return values

    @pydantic.model_validator(mode="after")
    def _counted(self) -> Self:
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries and num_hidden_layers is "
                f"{self.num_hidden_layers}; there is one a layer"
            )
        if self.sliding_window is None and "sliding_attention" in self.kinds():
            raise ValueError("layers have a window and sliding_window is not set; set it")
        return self

    def kinds(self) -> tuple[str, ...]:
        """Of every layer, in Hugging Face's words."""
        return self.layer_types or self.usual_kinds(self.num_hidden_layers)

    @classmethod
    def usual_kinds(cls, layers: int) -> tuple[str, ...]:
        """Of so many layers where nothing is said."""
        full = range(cls.full_every - 1, layers, cls.full_every)
        return tuple("full_attention" if i in full else "sliding_attention" for i in range(layers))

    def window(self, kind: str) -> int | None:
        """How many keys a layer of this kind sees; None for all."""
        return self.sliding_window if kind == "sliding_attention" else None

    def to_hf(self) -> dict[str, Any]:
        """As `Rotary.to_hf`, with every layer's type."""
        return {**super().to_hf(), "layer_types": list(self.kinds())}


class TwoRopes(Windowed):
    """A config whose layers with a window are turned by plain RoPE; `rope_scaling` is of those that
    see all."""

    def local_theta(self) -> float:
        """The base of layers with a window."""
        return self.rope_theta

    def rotations(self) -> dict[str, rope.Rotation]:
        """One for every kind of layer."""
        local = self.rotation(rope.Default(), self.local_theta())
        return {"full_attention": self.rotation(self.rope_scaling), "sliding_attention": local}

    @classmethod
    def _read(cls, values: dict[str, Any], source: str) -> dict[str, Any]:
        """The newer `rope_parameters` has an entry for each kind of layer."""
        by_kind = _mapping(values, "rope_parameters", source)
        if "full_attention" not in by_kind:
            return super()._read(values, source)
        values["rope_parameters"] = full = _mapping(by_kind, "full_attention", source)
        said = _mapping(by_kind, "sliding_attention", source)
        own = "rope_local_base_freq" in cls.model_fields
        base = {} if own else {"rope_theta": full.get("rope_theta")}
        local = {"rope_type": "default", **base, **said}
        if own:
            _agree(values, "rope_local_base_freq", local.get("rope_theta"), source)
        same = own or local.get("rope_theta") == full.get("rope_theta")
        if local["rope_type"] != "default" or not same:
            raise ModelError(
                f"{source}: rope_parameters of sliding_attention are {local}; supported is plain "
                "RoPE" + ("" if own else f" at the base of full_attention, {full['rope_theta']}")
            )
        return super()._read(values, source)


class LateWindows(Windowed):
    """A config whose layers see all keys, or with `use_sliding_window` a window from layer
    `max_window_layers` on, as Hugging Face's files say it."""

    @classmethod
    def _read(cls, values: dict[str, Any], source: str) -> dict[str, Any]:
        values = super()._read(values, source)
        used, full = values.pop("use_sliding_window", None), values.pop("max_window_layers", None)
        if not used:
            values = {**values, "sliding_window": None}
        layers = _count(values, "num_hidden_layers")
        if used and layers and values.get("sliding_window") and not values.get("layer_types"):
            first = min(layers, layers if full is None else full)
            late = ["sliding_attention"] * (layers - first)
            values["layer_types"] = ["full_attention"] * first + late
        return values

    def to_hf(self) -> dict[str, Any]:
        """As `Windowed.to_hf`, in the older spelling too."""
        first = (*self.kinds(), "sliding_attention").index("sliding_attention")
        used = {"use_sliding_window": self.sliding_window is not None, "max_window_layers": first}
        return {**super().to_hf(), **used}


def _count(values: dict[str, Any], key: str) -> int | None:
    """What a count will be read as; None where it is missing or will be refused."""
    try:
        return _COUNT.validate_python(values.get(key))
    except pydantic.ValidationError:
        return None


def _mapping(values: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    """A copy of what is said under a key; empty where it is missing or null."""
    said = values.get(key)
    if said is not None and not isinstance(said, dict):
        raise ModelError(f"{source}: `{key}` = {said!r:.80} must be a mapping or null")
    return dict(said or {})


def _agree(values: dict[str, Any], key: str, nested: Any, source: str) -> None:
    """Takes what RoPE's newer spelling says of a key, which the older one may say too."""
    if nested is None:
        return
    if values.get(key) not in (None, nested):
        raise ModelError(
            f"{source}: `{key}` = {values[key]} and rope_parameters say {nested}; remove one"
        )
    values[key] = nested


def _plain_rope(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Folds the newer `rope_parameters` into `rope_theta`, `partial_rotary_factor` and
    `rope_scaling`, and the older `type` into `rope_type`."""
    newer = _mapping(values, "rope_parameters", source)
    part = newer.pop("partial_rotary_factor", None)
    scaling = _mapping(values, "rope_scaling", source) or newer
    values = {k: v for k, v in values.items() if k not in ("rope_parameters", "rope_scaling")}
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling.pop("type"))
        scaling.pop("type", None)
    _agree(values, "partial_rotary_factor", part, source)
    _agree(values, "rope_theta", scaling.pop("rope_theta", newer.get("rope_theta")), source)
    if scaling.get("rope_type") is None and scaling.get("factor") is not None:
        raise ModelError(
            f"{source}: rope_scaling has factor = {scaling['factor']} and no rope_type; say which "
            f"of {', '.join(rope.TYPES[1:])} it is, or remove it"
        )
    kind = scaling.setdefault("rope_type", "default")
    if kind not in rope.TYPES:
        raise ModelError(
            f"{source}: RoPE type `{kind}` is not supported; supported: {', '.join(rope.TYPES)}"
        )
    return {**values, "rope_scaling": scaling if kind != "default" else {"rope_type": "default"}}
