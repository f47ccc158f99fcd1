"""A sentencepiece model made for a test."""

from collections.abc import Sequence
from pathlib import Path

import sentencepiece


def sentencepiece_model(folder: Path, texts: Sequence[str], vocab_size: int) -> bytes:
    """Trained on the lines of some texts; it can write every byte."""
    prefix = folder / "model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.splitlines()]),
        model_prefix=str(prefix),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model").read_bytes()
