import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.data.formats import Documents, Part
from ropewalk.data.records import TextRecords
from ropewalk.text import bpe
from tests.data.corpora import BYTE, words


class Memory(Part):
    """Documents in memory, each with a bound that is too high, as a format's bound may be."""

    def __init__(self, texts: list[bytes], slack: int) -> None:
        self._texts = texts
        self.bounds = np.array([len(text) + slack for text in texts], np.int64)

    def text(self, i: int) -> bytes:
        return self._texts[i]

    def name(self, i: int) -> str:
        return f"document {i}"


TEXT = st.one_of(
    st.text(max_size=50),
    st.integers(0, 10**6).map(lambda seed: words(seed, 900)),
    st.integers(1000, 5000).map(lambda n: "é" * n),  # no place to cut but between characters
    st.integers(1000, 3000).map(lambda n: "\n" * n),
    st.integers(1000, 3000).map(lambda n: "a😀 " * n),
)


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=3), slack=st.sampled_from([0, 100, 9000]))
def test_spans_are_the_document_in_order(texts: list[str], slack: int) -> None:
    documents = Documents([Memory([text.encode() for text in texts], slack)])
    records = TextRecords(documents, BYTE, np.arange(len(texts)), span_bytes=1024)
    targets: list[int] = []
    before: list[int] = []
    for record in (records[i] for i in range(len(records))):
        if record.begins:
            before = [256]
        if len(record.tokens):
            assert record.tokens[0] == before[-1]  # the token before, as context
            before = record.tokens.tolist()
            targets += before[1:]
            assert len(record.tokens) < 1024 + 512
    assert targets == [id for text in texts if text for id in [*text.encode(), 257]]


def test_spans_of_a_bpe_are_cut_where_words_end() -> None:
    text = words(0, 4000)
    tokenizer = bpe.train([text], 400)
    documents = Documents([Memory([text.encode()], 0)])
    records = TextRecords(documents, tokenizer, np.arange(1), span_bytes=1024)
    ids = [id for i in range(len(records)) for id in records[i].tokens[1:].tolist()]
    assert len(records) > 20
    assert ids == [*tokenizer.encode(text), tokenizer.eos_ids[0]]
    for one, other in itertools.pairwise(records[i].tokens.tolist() for i in range(len(records))):
        assert one[-1] == other[0]


@pytest.mark.parametrize("span_bytes", [None, 2048])
def test_a_selection_and_a_limit(tmp_path: Path, span_bytes: int | None) -> None:
    texts = [words(i, 40) for i in range(5)]
    documents = Documents([Memory([text.encode() for text in texts], 0)])
    records = TextRecords(documents, BYTE, np.array([1, 3]), span_bytes, limit=20)
    assert len(records) == 2 and records.bytes == sum(len(texts[i].encode()) for i in (1, 3))
    for i, document in enumerate((1, 3)):
        record = records[i]
        text = texts[document].encode()
        assert record.tokens.tolist() == [256, *text[:20]]
        assert record.dropped == len(text) + 1 - 20
        assert record.name == f"document {document}"
