"""GGUF files in: a Hugging Face style config, dequantized tensors, the tokenizer's parts.

Parsing and dequantization are the `gguf` package's. Knows no family: a family's config says what
such files call it and which keys it understands, and its rules what a file did to a tensor.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGUFReader, Keys, ReaderTensor, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import dequantize

from ropewalk.core.errors import ModelError
from ropewalk.core.storage import regular_file
from ropewalk.core.weights import Rule

SUPPORTED = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
ROPE_FREQS = "rope_freqs.weight"

_MAX = float(np.finfo(np.float32).max)

# Our name of a tokenizer part -> its key in the file. `kind` is gpt2 (byte-level BPE) or llama
# (sentencepiece) among others; `token_types` are ggml's (1 normal, 3 control ...).
TOKENIZER_PARTS = {
    "kind": Keys.Tokenizer.MODEL,
    "pre": Keys.Tokenizer.PRE,
    "tokens": Keys.Tokenizer.LIST,
    "merges": Keys.Tokenizer.MERGES,
    "scores": Keys.Tokenizer.SCORES,
    "token_types": Keys.Tokenizer.TOKEN_TYPE,
    "bos_token_id": Keys.Tokenizer.BOS_ID,
    "eos_token_id": Keys.Tokenizer.EOS_ID,
    "eot_token_id": Keys.Tokenizer.EOT_ID,
    "eom_token_id": Keys.Tokenizer.EOM_ID,
    "pad_token_id": Keys.Tokenizer.PAD_ID,
    "unk_token_id": Keys.Tokenizer.UNK_ID,
    "add_bos_token": Keys.Tokenizer.ADD_BOS,
    "add_eos_token": Keys.Tokenizer.ADD_EOS,
    "add_space_prefix": Keys.Tokenizer.ADD_PREFIX,
    "chat_template": Keys.Tokenizer.CHAT_TEMPLATE,
}

# Keys that cannot change what the model computes from its weights, each with the values at which
# that holds; None for any.
_HARMLESS: dict[str, tuple[Any, ...] | None] = {
    Keys.LLM.VOCAB_SIZE: None,  # the embedding has it
    Keys.LLM.TENSOR_DATA_LAYOUT: None,  # in files of 2023
    Keys.Rope.SCALING_FINETUNED: None,
    Keys.Attention.CAUSAL: (True,),
    Keys.LLM.EXPERT_COUNT: (0,),
    Keys.LLM.EXPERT_USED_COUNT: (0,),
}


class File:
    """An open GGUF file: `config`, `tokenizer`, and the tensors through `reader`.

    `architecture` is its name of the family; `config` is what the files of all families say, in
    the words of Hugging Face.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads the metadata.

        Raises a UserError when the file is cut, damaged, of several parts, or lacks a key.
        """
        self.path = Path(path)
        real = regular_file(self.path)
        try:
            with np.errstate(over="raise"):  # offsets near 2**64
                gguf = _BoundedReader(real)
            self.metadata = {name: field.contents() for name, field in gguf.fields.items()}
        except (ValueError, LookupError, TypeError, ArithmeticError, OSError) as error:
            raise ModelError(
                f"{path}: not a sound GGUF file of {real.stat().st_size} bytes: {error}; "
                "download it again"
            ) from None
        if gguf.byte_order == "S":
            raise ModelError(
                f"{path}: is a big-endian GGUF file, which is not supported; get the "
                "little-endian one"
            )
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in gguf.tensors}
        parts = self.metadata.get(Keys.Split.LLM_KV_SPLIT_COUNT, 1)
        if parts != 1:
            raise ModelError(
                f"{path}: is one of {parts} parts; join them with `llama-gguf-split --merge`"
            )
        self._read = set[str]()
        self.architecture = str(self._key(Keys.General.ARCHITECTURE))
        self.config = self._config()

    @property
    def tokenizer(self) -> dict[str, Any]:
        """The parts that the file holds of `TOKENIZER_PARTS`, as Python values.

        Raises ModelError when the file has no tokenizer.
        """
        self._key(Keys.Tokenizer.MODEL)
        return {
            part: self.metadata[key]
            for part, key in TOKENIZER_PARTS.items()
            if key in self.metadata
        }

    def described(self, understood: Collection[str]) -> dict[str, Any]:
        """`config` with what this file says beyond it, of the names that its family understands.

        Raises ModelError for a key of the architecture that then is left over.
        """
        readers = {
            "sliding_window": (Keys.Attention.SLIDING_WINDOW, self._count),
            "layer_types": (Keys.Attention.SLIDING_WINDOW_PATTERN, self._layer_types),
            "rope_local_base_freq": (Keys.Rope.FREQ_BASE_SWA, self._real),
            "attn_logit_softcapping": (Keys.LLM.ATTN_LOGIT_SOFTCAPPING, self._real),
            "final_logit_softcapping": (Keys.LLM.FINAL_LOGIT_SOFTCAPPING, self._real),
        }
        config = self.config | {
            name: read(key)
            for name, (key, read) in readers.items()
            if name in understood and self._has(key)
        }
        harmless = {self._name(key): values for key, values in _HARMLESS.items()}
        for key, value in self.metadata.items():
            known = key in self._read or not key.startswith(f"{self.architecture}.")
            if not known and key in harmless:
                values = harmless[key]
                known = values is None or value in values
            if not known:
                raise ModelError(
                    f"{self.path}: metadata key `{key}` is {value!r:.80}, which is not understood "
                    "and could change what the model computes; use its Hugging Face directory"
                )
        return config

    def reader(self, rules: Iterable[Rule]) -> "Reader":
        """The tensors under the names that a family's rules use."""
        return Reader(self, rules)

    def dequantized(self, name: str) -> np.ndarray:
        """One tensor, by its name in the file, as float32.

        Raises ModelError when its type is unsupported.
        """
        tensor = self.tensors[name]
        kind = tensor.tensor_type.name
        if kind not in SUPPORTED:
            raise ModelError(
                f"{self.path}: tensor `{name}` has type {kind}, which is not supported; "
                f"supported are {', '.join(SUPPORTED)}: get the model in one of those"
            )
        values = dequantize(tensor.data, tensor.tensor_type)
        return values.reshape(_shape(tensor)).astype(np.float32, copy=False)

    def _has(self, key: str) -> bool:
        return self._name(key) in self.metadata

    def _key(self, key: str, default: Any = None) -> Any:
        name = self._name(key)
        self._read.add(name)
        value = self.metadata.get(name, default)
        if value is None:
            raise ModelError(
                f"{self.path}: metadata key `{name}` is missing, without which the model is "
                "not known"
            )
        return value

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._key(key, default)
        if type(value) is not int or value < 1:
            raise ModelError(
                f"{self.path}: metadata key `{self._name(key)}` is {value!r:.80}, expected one "
                "count >= 1"
            )
        return value

    def _real(self, key: str, default: float | None = None) -> float:
        value = self._key(key, default)
        if not isinstance(value, int | float) or not 0 < value < _MAX:
            raise ModelError(
                f"{self.path}: metadata key `{self._name(key)}` is {value!r:.80}, expected a "
                "number > 0"
            )
        return _decimal(value)

    def _layer_types(self, key: str) -> list[str]:
        """From a flag a layer, or a number n: every n-th sees all, none does where n is 0."""
        value, layers = self._key(key), self.config["num_hidden_layers"]
        if type(value) is int and value >= 0:
            value = [not value or (layer + 1) % value != 0 for layer in range(layers)]
        if not isinstance(value, list) or len(value) != layers:
            raise ModelError(
                f"{self.path}: metadata key `{self._name(key)}` is {value!r:.80}, expected a "
                f"number >= 0, or a flag for each of the {layers} layers"
            )
        return ["sliding_attention" if windowed else "full_attention" for windowed in value]

    def _name(self, key: str) -> str:
        return key.format(arch=self.architecture) if "{arch}" in key else key

    def _config(self) -> dict[str, Any]:
        heads = self._count(Keys.Attention.HEAD_COUNT)
        hidden = self._count(Keys.LLM.EMBEDDING_LENGTH)
        head_dim = self._count(Keys.Attention.KEY_LENGTH, hidden // heads)
        for key in (Keys.Attention.VALUE_LENGTH, Keys.Rope.DIMENSION_COUNT):
            if self._key(key, head_dim) != head_dim:
                problem = f"metadata key `{self._name(key)}` is {self._key(key)!r:.80}"
                raise ModelError(
                    f"{self.path}: {problem}, which must equal the head size {head_dim}; "
                    "use another file of a supported model"
                )
        if head_dim % 2:
            raise ModelError(f"{self.path}: its heads have size {head_dim}, rotary ones are even")
        layers = self._count(Keys.LLM.BLOCK_COUNT)
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2 or layers > len(self.tensors):
            held = f"{layers} layers by its metadata and {len(self.tensors)} tensors"
            raise ModelError(
                f"{self.path}: is not a whole language model: {held}; `token_embd.weight` must "
                "be a matrix"
            )
        config = {
            "vocab_size": _shape(embedding)[0],
            "hidden_size": hidden,
            "intermediate_size": self._count(Keys.LLM.FEED_FORWARD_LENGTH),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self._count(Keys.Attention.HEAD_COUNT_KV, heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._count(Keys.LLM.CONTEXT_LENGTH),
            "rms_norm_eps": self._real(Keys.Attention.LAYERNORM_RMS_EPS),
            "rope_theta": self._real(Keys.Rope.FREQ_BASE, 10000.0),
            "tie_word_embeddings": "output.weight" not in self.tensors,
        }
        if scaling := self._rope_scaling(head_dim, config["rope_theta"]):
            config["rope_scaling"] = scaling
        for key, tensor in (("attention_bias", "attn_output"), ("mlp_bias", "ffn_gate")):
            if f"blk.0.{tensor}.bias" in self.tensors:
                config[key] = True
        ids = {"bos_token_id": Keys.Tokenizer.BOS_ID, "eos_token_id": Keys.Tokenizer.EOS_ID}
        return config | {
            name: self.metadata[key] for name, key in ids.items() if key in self.metadata
        }

    def _rope_scaling(self, head_dim: int, theta: float) -> dict[str, Any] | None:
        original = {}
        if self._has(Keys.Rope.SCALING_ORIG_CTX_LEN):
            original = {
                "original_max_position_embeddings": self._count(Keys.Rope.SCALING_ORIG_CTX_LEN)
            }
        if ROPE_FREQS in self.tensors:
            return self._banded_scaling(head_dim, theta, **original)
        old = self._real("{arch}.rope.scale_linear", 1.0)  # in files of 2023
        factor = self._real(Keys.Rope.SCALING_FACTOR, old)
        kind = self._key(Keys.Rope.SCALING_TYPE, "linear")
        if kind == "none" or (kind == "linear" and factor == 1):
            return None
        return {"rope_type": kind, "factor": factor, **(original if kind != "linear" else {})}

    def _banded_scaling(
        self, head_dim: int, theta: float, original_max_position_embeddings: int = 8192
    ) -> dict[str, Any]:
        """The config behind `rope_freqs.weight`, a divisor a frequency. arXiv:2407.21783"""
        found = self.dequantized(ROPE_FREQS)
        original, low, high = original_max_position_embeddings, 1.0, 4.0
        factor = _decimal(found.max(initial=1.0))
        turns = original / (2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        with np.errstate(divide="ignore"):  # an infinite factor, which is refused below
            wanted = 1 / ((1 - smooth) / factor + smooth)
        same = found.shape == wanted.shape and np.allclose(found, wanted, rtol=1e-4)
        if not same or not np.isfinite(factor):
            raise ModelError(
                f"{self.path}: `{ROPE_FREQS}` {list(found.shape)} does not follow the rule for "
                f"factor {factor}, low 1, high 4, original context {original}, which alone is "
                "supported; use the model's Hugging Face directory"
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }


class Reader:
    """A GGUF file's tensors as Hugging Face has them: names, order of rows; all float32."""

    lazy = False

    def __init__(self, file: File, rules: Iterable[Rule]) -> None:
        """Pairs names through the gguf package's map.

        Raises ModelError for an architecture that it does not know.
        """
        self.file = file
        self.place = str(file.path)
        self._pairs = dict(_names(file, rules))
        known = {ours: theirs for ours, (theirs, _) in self._pairs.items()}
        rest = file.tensors.keys() - set(known.values()) - {ROPE_FREQS}
        names = known | {name: name for name in sorted(rest)}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            ours: _shape(file.tensors[theirs]) for ours, theirs in names.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32. Raises ModelError when its type is unsupported."""
        theirs, rule = self._pairs[name]
        tensor = self.file.dequantized(theirs)
        if rule.gguf == "rope_pairs":
            return _apart(tensor, self.file.config["head_dim"])
        return tensor - 1 if rule.gguf == "plus_one" else tensor


class _BoundedReader(GGUFReader):
    """The stock reader takes what lies past the file's end for empty, and may loop for ever."""

    def _get(
        self,
        offset: int,
        dtype: Any,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> np.ndarray:
        kind = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
        return np.frombuffer(self.data, kind, int(count), offset)  # raises ValueError past the end


def read(path: str | Path) -> File:
    """Opens a GGUF file. Raises a UserError when it is not a sound one, or not a language model."""
    return File(path)


def _names(file: File, rules: Iterable[Rule]) -> Iterable[tuple[str, tuple[str, Rule]]]:
    """(Hugging Face name, (name in the file, rule)) for every tensor that file and rules have."""
    architecture = {name: key for key, name in MODEL_ARCH_NAMES.items()}.get(file.architecture)
    if architecture is None:
        raise ModelError(
            f"{file.path}: `general.architecture` is `{file.architecture}`, which the gguf "
            "package lacks"
        )
    layers = file.config["num_hidden_layers"]
    names = get_tensor_name_map(architecture, layers)
    for rule in rules:
        for i in range(layers if "{i}" in rule.source else 1):
            ours = rule.source.format(i=i)
            theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
            if theirs in file.tensors:
                yield ours, (theirs, rule)


def _apart(tensor: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from interleaved rotary pairs (0, h/2, 1, h/2+1 ...) back to two halves."""
    pairs = tensor.reshape(-1, head_dim // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(reversed(tensor.shape.tolist()))


def _decimal(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
