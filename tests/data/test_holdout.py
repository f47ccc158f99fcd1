import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ropewalk.core.errors import DataError
from ropewalk.data import pipeline
from ropewalk.data.holdout import Heldout
from ropewalk.data.stats import count
from tests.data.corpora import BYTE, config, equal, pairs, segments, words, write_lines

TITLES = ["alpha", "beta", "gamma", "delta"]
TEXTS = [words(i, n) for i, n in enumerate((30, 700, 5, 90))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("holdout") / "a.jsonl", TEXTS, title=TITLES)


def test_every_held_out_token_once(corpus: Path) -> None:
    held = Heldout(config(corpus, holdout={"values": ["delta", "beta"]}), BYTE)
    batches = list(held)
    text = [TEXTS[1].encode(), TEXTS[3].encode()]
    assert count(batches).tokens == sum(len(t) + 1 for t in text)
    assert held.names == [f"{corpus}:2", f"{corpus}:4"]
    for name, whole in zip(held.names, text, strict=True):
        mine = [segment for segment in segments(batches) if segment[0] == name]
        assert pairs(mine) == Counter(itertools.pairwise([256, *whole, 257]))
        assert all(tokens[1:] == targets[:-1] for _, tokens, targets in mine)
    assert {batch.arrays["tokens"].shape for batch in batches} == {(4, 32)}
    assert all(equal(a, b) for a, b in zip(held, batches, strict=True))  # again, and the same


def test_training_never_sees_what_is_held_out(corpus: Path) -> None:
    settings = config(corpus, holdout={"values": ["beta"]}, epochs=1)
    trained = segments(pipeline.Batches(settings, BYTE))
    held = segments(Heldout(settings, BYTE))
    everything = segments(pipeline.Batches(config(corpus, epochs=1), BYTE))
    assert {name for name, _, _ in trained} == {f"{corpus}:{i}" for i in (1, 3, 4)}
    assert pairs(trained) + pairs(held) == pairs(everything)
    assert list(pipeline.texts(settings)) == [TEXTS[i] for i in (0, 2, 3)]


def test_processes_share_the_rows(corpus: Path) -> None:
    settings = config(corpus, holdout={"values": ["beta"]})
    whole = list(Heldout(settings, BYTE, batch_size=6))
    for processes in (2, 3):
        parts = [list(Heldout(settings, BYTE, 6, p, processes)) for p in range(processes)]
        for batch, *shares in zip(whole, *parts, strict=True):
            for name, array in batch.arrays.items():
                joined = np.concatenate([share.arrays[name] for share in shares])
                assert np.array_equal(joined, array)


def test_a_source_of_its_own(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("kept apart")
    settings = config(corpus, holdout={"source": {"path": str(tmp_path / "held.txt")}})
    assert count(Heldout(settings, BYTE)).tokens == len("kept apart") + 1
    assert list(pipeline.texts(settings)) == TEXTS


def test_files_can_be_held_out_by_name(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    settings = config(tmp_path / "*.txt", holdout={"column": "file", "values": ["2.txt"]})
    assert Heldout(settings, BYTE).names == [str(tmp_path / "2.txt")]
    assert list(pipeline.texts(settings)) == [TEXTS[i] for i in (0, 1, 3)]


def test_what_cannot_be_held_out_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`title` = `betta` to hold out; did you mean `beta`"):
        Heldout(config(corpus, holdout={"values": ["alpha", "betta"]}), BYTE)
    with pytest.raises(DataError, match=r"`name` = `beta`.*columns found: text, title, file"):
        Heldout(config(corpus, holdout={"column": "name", "values": ["beta"]}), BYTE)
    with pytest.raises(DataError, match="nothing is held out"):
        Heldout(config(corpus), BYTE)
    empty = write_lines(tmp_path / "e.jsonl", [""])
    with pytest.raises(DataError, match="1 held-out documents hold no text"):
        Heldout(config(corpus, holdout={"source": {"path": str(empty)}}), BYTE)
    with pytest.raises(DataError, match="holdout source needs a `path`"):
        Heldout(config(corpus, holdout={"source": {"synthetic": {"vocab_size": 9}}}), BYTE)
