import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ropewalk.checkpoint.manager import unite
from ropewalk.core.errors import CheckpointError, ConfigError, DataError
from ropewalk.data.pipeline import Batches, Config, texts
from ropewalk.data.stats import Batch, count
from ropewalk.text import bpe
from tests.data.corpora import BYTE, config, equal, pairs, segments, take, words, write_lines

LENGTHS = [3, 500, 40, 1, 7, 1300, 12, 0, 90, 33, 5]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents from nothing at all to several spans long."""
    folder = tmp_path_factory.mktemp("corpus")
    return write_lines(folder / "a.jsonl", [words(i, n) for i, n in enumerate(LENGTHS)])


def joined(parts: list[Batch]) -> Batch:
    """The global batch from the rows of all processes."""
    return Batch(
        {name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays},
        tuple(row for part in parts for row in part.names),
        sum(part.begins for part in parts),
        sum(part.dropped for part in parts),
    )


def expected(corpus: Path) -> Counter[tuple[int, int]]:
    """The pairs of an epoch, from the text itself."""
    found: Counter[tuple[int, int]] = Counter()
    for line in corpus.read_text().splitlines():
        if text := json.loads(line)["text"]:
            found += Counter(itertools.pairwise([256, *text.encode(), 257]))
    return found


@pytest.mark.parametrize("order", ["shuffled", "file"])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_an_epoch_trains_on_every_token_once(corpus: Path, order: str, batch_size: int) -> None:
    settings = config(corpus, epochs=1, order=order, batch_size=batch_size)
    batches = list(Batches(settings, BYTE))
    assert pairs(segments(batches)) == expected(corpus)
    stats = count(batches)
    assert stats.tokens == expected(corpus).total()
    assert stats.documents == sum(n > 0 for n in LENGTHS)
    assert stats.dropped == 0
    assert stats.slots == stats.tokens + stats.padding == len(batches) * batch_size * 32


def test_epochs_hold_the_same_in_another_order(corpus: Path) -> None:
    twice = segments(Batches(config(corpus, epochs=2), BYTE))
    assert pairs(twice) == Counter({pair: 2 * n for pair, n in expected(corpus).items()})
    first, other = (
        [s[0] for s in segments(Batches(config(corpus, epochs=1, seed=seed), BYTE))]
        for seed in (0, 1)
    )
    assert first != other and Counter(first) != Counter()
    again = [s[0] for s in segments(Batches(config(corpus, epochs=1), BYTE))]
    assert again == first


@pytest.mark.parametrize("pack", ["best_fit", "none"])
def test_rows_keep_documents_apart(corpus: Path, pack: str) -> None:
    """Targets, positions and weights against their definitions, segment by segment."""
    texts = {
        f"{corpus}:{i + 1}": bytes(json.loads(line)["text"].encode())
        for i, line in enumerate(corpus.read_text().splitlines())
    }
    batches = take(Batches(config(corpus, pack=pack), BYTE), 40)
    for name, tokens, targets in segments(batches):
        assert tokens[1:] == targets[:-1]
        inside = bytes(t for t in [tokens[0], *targets] if t < 256)
        assert inside in texts[name]  # nothing of another document
        assert 256 not in targets and 257 not in tokens
    for batch in batches:
        arrays = batch.arrays
        assert {k: (v.dtype.name, v.shape) for k, v in arrays.items()} == {
            "tokens": ("int32", (4, 32)),
            "targets": ("int32", (4, 32)),
            "positions": ("int32", (4, 32)),
            "segment_ids": ("int32", (4, 32)),
            "weights": ("float32", (4, 32)),
        }
        ids = arrays["segment_ids"]
        assert np.array_equal(arrays["weights"], (ids > 0).astype(np.float32))
        for name in ("tokens", "targets", "positions"):
            assert not arrays[name][ids == 0].any()
        for row, names, positions in zip(ids, batch.names, arrays["positions"], strict=True):
            assert sorted(set(row.tolist()) - {0}) == list(range(1, len(names) + 1))
            assert pack == "best_fit" or len(names) == 1
            for segment in range(1, len(names) + 1):
                (places,) = np.nonzero(row == segment)
                assert positions[places].tolist() == list(range(len(places)))
                assert places.tolist() == list(range(places[0], places[0] + len(places)))


STREAMS: list[dict[str, Any]] = [
    {},
    {"order": "file", "seed": 3},
    {"pack": "none", "long": "truncate"},
    {"epochs": 3},
]


@pytest.mark.parametrize("keys", STREAMS, ids=str)
@pytest.mark.parametrize("stop", [0, 1, 6, 17])
@pytest.mark.parametrize("before", [1, 2, 4])
def test_state_restores_the_rest_of_the_stream_in_any_number_of_processes(
    corpus: Path, keys: dict[str, Any], stop: int, before: int
) -> None:
    settings = config(corpus, **keys)
    reference = take(Batches(settings, BYTE), stop + 12)
    writers = [Batches(settings, BYTE, p, before) for p in range(before)]
    for i in range(stop):
        assert equal(joined([next(writer) for writer in writers]), reference[i])
    states = [json.loads(json.dumps(writer.get_state())) for writer in writers]
    state = unite(states[::-1])
    assert state["batches"] == stop
    assert sorted(state["lanes"]) == ["0", "1", "2", "3"]
    for after in (1, 2, 4):
        readers = [Batches(settings, BYTE, p, after) for p in range(after)]
        for reader in readers:
            reader.set_state(state)
        assert unite([reader.get_state() for reader in readers]) == state
        for i in range(stop, stop + 12):
            assert equal(joined([next(reader) for reader in readers]), reference[i])


def test_state_can_be_set_in_the_middle_and_is_not_moved_by_prefetch(corpus: Path) -> None:
    batches = Batches(config(corpus), BYTE)
    take(batches, 3)
    state = batches.get_state()
    following = take(batches, 6)
    assert batches.get_state() != state
    batches.set_state(state)
    assert batches.get_state() == state
    assert all(equal(a, b) for a, b in zip(take(batches, 6), following, strict=True))
    batches.close()


def test_processes_that_are_done_go_on_with_padding(corpus: Path) -> None:
    settings = config(corpus, epochs=1)
    whole = list(Batches(settings, BYTE))
    halves = [Batches(settings, BYTE, p, 2) for p in range(2)]
    for batch in whole:
        assert equal(joined([next(half) for half in halves]), batch)
    assert all(not next(half).arrays["weights"].any() for half in halves)


def test_state_of_other_data_is_refused_by_name(corpus: Path, tmp_path: Path) -> None:
    state = Batches(config(corpus), BYTE).get_state()
    with pytest.raises(DataError, match="batch_size was 4, is 8"):
        Batches(config(corpus, batch_size=8), BYTE).set_state(state)
    with pytest.raises(DataError, match="vocab_size was 259, is 300"):
        Batches(config(corpus), bpe.train(texts(config(corpus)), 300)).set_state(state)
    other = write_lines(tmp_path / "b.jsonl", [words(1, 5)])
    with pytest.raises(DataError, match=r"records was \[\d+\], is \[1\]"):
        Batches(config(other), BYTE).set_state(state)
    half = Batches(config(corpus), BYTE, 1, 2)
    with pytest.raises(DataError, match="2 rows of the batch and not row 0"):
        Batches(config(corpus), BYTE).set_state(half.get_state())
    next(half)
    with pytest.raises(CheckpointError, match="`batches` is 0 on one and 1 on another"):
        unite([state, half.get_state()])
    with pytest.raises(DataError, match="batch_size 4 is not divisible by 3 processes"):
        Batches(config(corpus), BYTE, 0, 3)


def test_data_changed_in_place_is_refused_by_file_and_a_copy_is_not(tmp_path: Path) -> None:
    """Also where neither size, number of records nor any document's length tells."""
    files = [write_lines(tmp_path / f"{name}.jsonl", [words(i, 50)]) for i, name in enumerate("ab")]
    state = json.loads(json.dumps(Batches(config(*files), BYTE).get_state()))
    copies = [Path(shutil.copy(file, tmp_path / f"copy-{file.name}")) for file in files]
    Batches(config(*copies), BYTE).set_state(state)
    older = {**state, "data": {k: v for k, v in state["data"].items() if k != "files"}}
    files[1].write_text(files[1].read_text().replace("w1.7", "w1.8"))
    Batches(config(*files), BYTE).set_state(older)  # saved before files had fingerprints
    with pytest.raises(DataError, match=r"content of .*b\.jsonl is another.*`directory`") as caught:
        Batches(config(*files), BYTE).set_state(state)
    assert "a.jsonl" not in str(caught.value)


def test_weights_are_shares_of_the_text(tmp_path: Path) -> None:
    """Whatever the sizes of the documents: 3 to 1 in tokens, and 1 to 1 when nothing is said."""
    long = write_lines(tmp_path / "long.jsonl", [words(i, 600) for i in range(8)])
    short = write_lines(tmp_path / "short.jsonl", [words(i, 9) for i in range(300)])
    for weights in ((3.0, 1.0), (1.0, 1.0), (1.0, 4.0)):
        sources = [
            {"path": str(file), "weight": weight}
            for file, weight in zip((long, short), weights, strict=True)
        ]
        batches = Batches(Config.parse({"sources": sources, "batch_size": 4, "length": 64}), BYTE)
        tokens: Counter[str] = Counter()
        for name, inputs, _ in segments(take(batches, 600)):
            tokens[name.partition(":")[0]] += len(inputs)
        share = tokens[str(long)] / tokens.total()
        assert abs(share - weights[0] / sum(weights)) < 0.03
        batches.close()


def test_long_documents_feed_every_row(tmp_path: Path) -> None:
    """One long document among few still reaches all rows, and rows do not repeat each other."""
    file = tmp_path / "long.txt"
    file.write_text(words(0, 20000))
    batches = list(Batches(config(file, epochs=1, batch_size=8), BYTE))
    stats = count(batches)
    assert stats.efficiency > 0.93
    assert pairs(segments(batches)).total() == len(file.read_bytes()) + 1


def test_truncating_counts_what_it_drops(corpus: Path) -> None:
    batches = list(Batches(config(corpus, epochs=1, long="truncate"), BYTE))
    sizes = [len(json.loads(line)["text"].encode()) for line in corpus.read_text().splitlines()]
    stats = count(batches)
    assert stats.dropped == sum(max(size + 1 - 32, 0) for size in sizes if size)
    assert stats.tokens == sum(min(size + 1, 32) for size in sizes if size)
    assert all(tokens[0] == 256 for _, tokens, _ in segments(batches))


def test_bpe_spans_cover_the_text(corpus: Path) -> None:
    tokenizer = bpe.train(texts(config(corpus)), 320)
    batches = list(Batches(config(corpus, epochs=1, order="file", batch_size=1), tokenizer))
    trained = sum(
        int(tokenizer.token_bytes()[targets].sum()) for _, _, targets in segments(batches)
    )
    text = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert trained == sum(len(t.encode()) for t in text)  # no byte twice, none left out
    plain = Counter(
        token for t in text if t for token in [*tokenizer.encode(t), tokenizer.eos_ids[0]]
    )
    found = Counter(token for _, _, targets in segments(batches) for token in targets)
    assert (plain - found).total() <= 3 * 5  # tokenizing in spans differs at the few cuts at most


def test_synthetic_tokens_have_few_successors() -> None:
    sources = [{"synthetic": {"vocab_size": 50, "documents": 200, "length": 33, "branches": 3}}]
    settings = Config.parse({"sources": sources, "batch_size": 4, "length": 32, "epochs": 1})
    batches = Batches(settings, None)
    assert batches.max_token_id == 49
    found = pairs(segments(batches))
    assert found.total() == 200 * 32
    followers: dict[int, set[int]] = {}
    for token, target in found:
        followers.setdefault(token, set()).add(target)
    assert set(followers) == set(range(50))
    assert max(map(len, followers.values())) <= 3


def test_what_is_wrong_is_said(tmp_path: Path, corpus: Path) -> None:
    empty = write_lines(tmp_path / "empty.jsonl", ["", "", ""])
    with pytest.raises(DataError, match=r"no text; is `column` the right one"):
        next(Batches(config(empty), BYTE))
    with pytest.raises(DataError, match="source 0 is text, which needs a tokenizer"):
        Batches(config(corpus), None)
    with pytest.raises(ConfigError, match="either `path` or `synthetic`"):
        Config.parse({"sources": [{"column": "text"}]})
    with pytest.raises(ConfigError, match="either `values` of a column or a `source`"):
        Config.parse({"sources": [{"path": "a"}], "holdout": {"column": "b"}})
    with pytest.raises(ConfigError, match="sources"):
        Config.parse({"sources": []})
    titled = write_lines(tmp_path / "t.jsonl", ["one"], title=["a"])
    with pytest.raises(DataError, match="1 documents and all are held out"):
        Batches(config(titled, holdout={"values": ["a"]}), BYTE)


def test_an_error_in_the_middle_of_the_stream_reaches_the_reader(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n{"text": "broken\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON"):
        take(Batches(config(file), BYTE), 3)


def test_processes_agree_on_all_but_their_own_rows(corpus: Path) -> None:
    """A checkpoint joins their states key by key, also where one has begun the next epoch."""
    settings = config(corpus)
    readers = [Batches(settings, BYTE, p, 4) for p in range(4)]
    for _ in range(400):
        for reader in readers:
            next(reader)
        shared = [
            {key: value for key, value in reader.get_state().items() if key != "lanes"}
            for reader in readers
        ]
        assert all(state == shared[0] for state in shared)
