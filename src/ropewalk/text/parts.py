"""A tokenizer from its bare parts (tokens, merges, scores), as a GGUF file carries them.

Knows nothing of the GGUF format itself: whoever reads the file hands the parts over.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import (  # classes are made when it is imported
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue]
    TrainerSpec,  # pyright: ignore[reportAttributeAccessIssue]
)
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ropewalk.core.errors import DataError
from ropewalk.text.tokenizer import HuggingFaceTokenizer, Roles, SentencePieceTokenizer, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LONE_DIGITS = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DIGIT = r"\p{N}"

# Llama 3 takes a word that is a token whole, whatever the merges say.
_WHOLE_WORDS = ("llama-bpe", "llama3")

# How a turn ends, which files say in the token's text alone where they name no token for it.
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")

SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (_DIGIT, _GPT2),
    "starcoder": (_DIGIT, _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "qwen2": (_LONE_DIGITS,),
}


@dataclass(frozen=True)
class Parts:
    """What a GGUF file says of its tokenizer (`tokenizer.ggml.*`), under the same names.

    `model` is `gpt2` (byte-level BPE: `tokens`, `merges`, `pre`) or `llama` (sentencepiece BPE:
    `tokens`, `scores`, `token_type`). Merges are "left right". `token_type` uses sentencepiece's
    numbers.
    """

    model: str
    tokens: Sequence[str]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    token_type: Sequence[int] = ()
    pre: str = "gpt-2"
    unk_id: int | None = None
    add_bos: bool | None = None
    """where a file is silent, sentencepiece and Llama 3's BPE do"""
    add_space_prefix: bool = True

    def starts_with_bos(self) -> bool:
        """Whether BOS goes before a prompt."""
        usual = self.model == "llama" or self.pre in _WHOLE_WORDS
        return usual if self.add_bos is None else self.add_bos


def build(parts: Parts, roles: Roles, name: str = "gguf") -> Tokenizer:
    """The tokenizer that these parts describe. Raises DataError on an unknown kind or parts that
    disagree."""
    if parts.token_type and len(parts.token_type) != len(parts.tokens):
        raise DataError(
            f"{name}: {len(parts.tokens)} tokens but {len(parts.token_type)} token types"
        )
    if parts.model == "gpt2":
        return _byte_level(parts, roles, name)
    if parts.model == "llama":
        return _sentencepiece(parts, roles, name)
    raise DataError(f"{name}: tokenizer model `{parts.model}` is not supported; gpt2 and llama are")


def end_of_turn(parts: Parts) -> int | None:
    """The id of the first control token whose text is one of END_OF_TURN, or None."""
    pairs = enumerate(zip(parts.tokens, parts.token_type, strict=False))  # `build` compares them
    return next((i for i, (token, kind) in pairs if kind == CONTROL and token in END_OF_TURN), None)


def _byte_level(parts: Parts, roles: Roles, name: str) -> Tokenizer:
    if parts.pre not in SPLITS:
        raise DataError(
            f"{name}: pre-tokenizer `{parts.pre}` is not supported; known are"
            f" {', '.join(sorted(SPLITS))}"
        )
    merges = []
    for merge in parts.merges:
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    vocab = {token: i for i, token in enumerate(parts.tokens)}
    try:
        whole = parts.pre in _WHOLE_WORDS
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=whole)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{name}: its tokens and merges do not fit together: {error}") from None
    backend = tokenizers.Tokenizer(model)
    if parts.pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[parts.pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    types = list(parts.token_type) or [NORMAL] * len(parts.tokens)
    backend.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(parts.tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    if parts.starts_with_bos() and roles.bos_id is not None:
        bos = parts.tokens[roles.bos_id]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, roles.bos_id)]
        )
    return HuggingFaceTokenizer(backend, name, roles)


def _sentencepiece(parts: Parts, roles: Roles, name: str) -> Tokenizer:
    if len(parts.scores) != len(parts.tokens):
        raise DataError(f"{name}: {len(parts.tokens)} tokens but {len(parts.scores)} scores")
    proto = ModelProto()
    trainer = proto.trainer_spec
    trainer.model_type = TrainerSpec.BPE
    trainer.vocab_size = len(parts.tokens)
    trainer.byte_fallback = BYTE in parts.token_type
    trainer.bos_id = -1 if roles.bos_id is None else roles.bos_id
    trainer.eos_id = roles.eos_ids[0] if roles.eos_ids else -1
    trainer.pad_id = -1 if roles.pad_id is None else roles.pad_id
    for field, token in (("bos", trainer.bos_id), ("eos", trainer.eos_id), ("pad", trainer.pad_id)):
        if token >= 0:
            setattr(trainer, f"{field}_piece", parts.tokens[token])
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = parts.add_space_prefix
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    types = list(parts.token_type) or [NORMAL] * len(parts.tokens)
    if parts.unk_id is not None:
        if not 0 <= parts.unk_id < len(types):
            raise DataError(f"{name}: unknown token {parts.unk_id} is outside its {len(types)} ids")
        types[parts.unk_id] = UNKNOWN
    for i, (token, score, kind) in enumerate(zip(parts.tokens, parts.scores, types, strict=True)):
        if kind == USER_DEFINED:  # its blanks are as in the text, and not escaped
            token = token.replace(" ", "\u2581")
        proto.pieces.add(piece=token, score=score, type=kind)
        if kind == UNKNOWN:
            trainer.unk_id = i
            trainer.unk_piece = token
    return SentencePieceTokenizer(proto.SerializeToString(), name, roles, parts.starts_with_bos())
