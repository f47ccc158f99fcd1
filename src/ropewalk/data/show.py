"""Packed batches for a person to look at: trained tokens coloured, document boundaries marked.

Renders rich text; where it goes is the caller's business.
"""

import numpy as np
from rich.table import Table
from rich.text import Text

from ropewalk.data.stats import Batch, Stats
from ropewalk.text.tokenizer import Tokenizer

# Two shades, so that neighbouring tokens can be told apart.
TRAINED = ("green", "bright_green")
CONTEXT = "dim"
SPECIAL = "bold magenta"
BOUNDARY = "bold yellow"


def legend() -> Text:
    """What the colours mean."""
    return Text.assemble(
        ("trained", TRAINED[0]), " ", ("tokens", TRAINED[1]), "   ",
        ("context only", CONTEXT), "   ",
        ("special token", SPECIAL), "   ", ("│ boundary of documents", BOUNDARY),
    )  # fmt: skip


def row(batch: Batch, i: int, tokenizer: Tokenizer | None) -> Text:
    """Row i of a batch: every token once, as text, or as its number where there is no tokenizer.

    A segment shows its first token, which is context, and then its targets, coloured where their
    loss weight is not zero.
    """
    arrays = {name: array[i] for name, array in batch.arrays.items()}
    segments = arrays["segment_ids"]
    result = Text()
    for segment, name in enumerate(batch.names[i], 1):
        (places,) = np.nonzero(segments == segment)
        result.append(f"│ {name} · {len(places)} tokens\n", BOUNDARY)
        ids = [arrays["tokens"][places[0]], *arrays["targets"][places]]
        trained = [False, *(arrays["weights"][places] > 0)]
        for k, (text, special) in enumerate(_spellings([int(token) for token in ids], tokenizer)):
            style = SPECIAL if special else TRAINED[k % 2]
            result.append(
                text, style if trained[k] else f"{CONTEXT} {SPECIAL if special else ''}".strip()
            )
        result.append("\n")
    padding = int((segments == 0).sum())
    if padding:
        result.append(f"│ padding · {padding} slots\n", CONTEXT)
    return result


def summary(stats: Stats) -> Table:
    """The counts as a table."""
    table = Table(show_header=False, box=None)
    table.add_column(justify="left")
    table.add_column(justify="right")
    for name, value in (
        ("batches", f"{stats.batches:,}"),
        ("documents begun", f"{stats.documents:,}"),
        ("pieces", f"{stats.pieces:,}"),
        ("tokens trained", f"{stats.tokens:,}"),
        ("tokens cut off", f"{stats.dropped:,}"),
        ("padding slots", f"{stats.padding:,}"),
        ("packing efficiency", f"{stats.efficiency:.1%}"),
    ):
        table.add_row(name, value)
    return table


def _spellings(ids: list[int], tokenizer: Tokenizer | None) -> list[tuple[str, bool]]:
    """Text and specialness by token; the bytes of a character cut in two are shown in
    hexadecimal."""
    if tokenizer is None:
        return [(f"{token} ", False) for token in ids]
    result = []
    for token in ids:
        special = tokenizer.spelling(token)
        piece = tokenizer.vocabulary.pieces[token]
        try:
            text = special or piece.decode("utf-8")
        except UnicodeDecodeError:
            text = "".join(f"\\x{byte:02x}" for byte in piece)
        result.append((text, bool(special)))
    return result
