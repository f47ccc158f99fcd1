"""Small corpora for the tests of this room, and what is left of their batches."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.data.pipeline import Batches, Config
from ropewalk.data.stats import Batch
from ropewalk.text.tokenizer import load

BYTE = load("byte")


def words(seed: int, count: int) -> str:
    """`count` made-up words in lines; a word names its document and place, so no two are alike."""
    random = np.random.default_rng(seed)
    lines, line = [], ""
    for i in range(count):
        line += f"w{seed}.{i}" + random.choice([" ", " ", ", ", "é "])
        if random.random() < 0.15:
            lines.append(line)
            line = ""
    return "\n".join([*lines, line])


def write_lines(file: Path, texts: Iterable[str], **columns: list[Any]) -> Path:
    """A .jsonl file of documents."""
    records = [
        {"text": text, **{name: values[i] for name, values in columns.items()}}
        for i, text in enumerate(texts)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def config(*paths: Path | str, **keys: Any) -> Config:
    """A configuration over some files, with small rows."""
    sources = [{"path": str(path)} for path in paths]
    return Config.parse({"sources": sources, "batch_size": 4, "length": 32, **keys})


def take(batches: Batches, count: int) -> list[Batch]:
    """The next `count` batches."""
    return [next(batches) for _ in range(count)]


def equal(one: Batch, other: Batch) -> bool:
    """Whether two batches are the same in everything."""
    same = all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)
    return same and (one.names, one.begins, one.dropped) == (
        other.names,
        other.begins,
        other.dropped,
    )


def segments(batches: Iterable[Batch]) -> list[tuple[str, list[int], list[int]]]:
    """Every segment as (document, tokens, targets), read from the arrays but for its name."""
    found = []
    for batch in batches:
        arrays = batch.arrays
        for i, names in enumerate(batch.names):
            for segment, name in enumerate(names, 1):
                (places,) = np.nonzero(arrays["segment_ids"][i] == segment)
                tokens, targets = (arrays[key][i][places].tolist() for key in ("tokens", "targets"))
                found.append((name.partition(" bytes ")[0], tokens, targets))
    return found


def pairs(segments: Iterable[tuple[str, list[int], list[int]]]) -> Counter[tuple[int, int]]:
    """How often each (token, target) is trained on."""
    return Counter(
        pair for _, tokens, targets in segments for pair in zip(tokens, targets, strict=True)
    )
