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
    add_bos: bool = False
    add_space_prefix: bool = True


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
        # Llama 3 takes a word that is a token whole, whatever the merges say.
        model = models.BPE(
            vocab=vocab, merges=merges, ignore_merges=parts.pre in ("llama-bpe", "llama3")
        )
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
    if parts.add_bos and roles.bos_id is not None:
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
    for i, (token, score, kind) in enumerate(zip(parts.tokens, parts.scores, types, strict=True)):
        proto.pieces.add(piece=token, score=score, type=kind)
        if kind == UNKNOWN:
            trainer.unk_id = i
            trainer.unk_piece = token
    return SentencePieceTokenizer(proto.SerializeToString(), name, roles, parts.add_bos)
