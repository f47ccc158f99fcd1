"""Training of a byte-level BPE. The same texts in the same order always give the same tokenizer."""

from collections.abc import Iterable

import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from ropewalk.core.errors import DataError
from ropewalk.text.tokenizer import HuggingFaceTokenizer, finish_byte_level

SPECIALS = 3
# Words with the blank or mark before them, numbers in threes, punctuation with its newlines.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(texts: Iterable[str], vocab_size: int, name: str = "bpe") -> HuggingFaceTokenizer:
    """A byte-level BPE of at most `vocab_size` ids: 256 bytes, merges, then BOS, EOS and padding.

    Every text can be encoded, whatever it was trained on. Raises DataError when `vocab_size` leaves
    no room for the bytes and the special tokens, or when there is no text at all.
    """
    if vocab_size < 256 + SPECIALS:
        raise DataError(
            f"vocab_size {vocab_size} is too small for a byte-level BPE: 256 bytes and {SPECIALS}"
            f" special tokens need {256 + SPECIALS}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    count = 0

    def counted() -> Iterable[str]:
        nonlocal count
        for text in texts:
            count += bool(text)
            yield text

    backend.train_from_iterator(counted(), trainer)
    if not count:
        raise DataError("a tokenizer cannot be trained: the sources hold no text")
    return finish_byte_level(backend, name)
