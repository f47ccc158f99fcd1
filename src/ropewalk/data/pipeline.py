"""The training stream: sources, mixture, shuffle, epochs, packing; its state is global and exact.

grain gives the order (shuffle, repeat, mix: any place of the stream at random access) and the
prefetch thread, whose state is that of the last batch handed out. The lanes of `pack` are the
packer on top.
"""

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import grain
import numpy as np
import pydantic

from ropewalk.core.config import Config as BaseConfig
from ropewalk.core.errors import DataError
from ropewalk.data import formats
from ropewalk.data.pack import Lane, Piece, Plan, fill
from ropewalk.data.records import Record, Records, SyntheticRecords, TextRecords
from ropewalk.data.source import Source, fingerprint
from ropewalk.data.stats import Batch
from ropewalk.text.tokenizer import Tokenizer

PREFETCH = 4
# Size of a span of a long document: enough for several rows, small enough to shuffle well.
BYTES_A_SLOT = 16
SMALLEST_SPAN = 2048


class Holdout(BaseConfig):
    """What is kept for evaluation: documents whose `column` has one of `values`, or a `source` of
    its own.

    The column `file` is the name of the file that a document is in.
    """

    column: str = "title"
    values: tuple[str, ...] = ()
    source: Source | None = None

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.values) == (self.source is not None):
            raise ValueError(
                "a holdout has either `values` of a column or a `source`, and not both, e.g. "
                "data.holdout={column: title, values: [macbeth]}"
            )
        return self


class Config(BaseConfig):
    """The data of a run: `batch_size` rows of `length` tokens.

    `epochs` null repeats for ever; with several sources the first to be used up ends an epoch.
    `order` is `shuffled` or as in the files. A document longer than a row is `split` over rows or
    `truncated`; `pack` puts several short documents in a row (`best_fit`) or one (`none`).
    """

    sources: tuple[Source, ...] = pydantic.Field(min_length=1)
    holdout: Holdout | None = None
    batch_size: int = pydantic.Field(default=16, ge=1)
    length: int = pydantic.Field(default=256, ge=1)
    seed: int = pydantic.Field(default=0, ge=0, lt=2**32)
    epochs: int | None = pydantic.Field(default=None, ge=1)
    order: Literal["shuffled", "file"] = "shuffled"
    long: Literal["split", "truncate"] = "split"
    pack: Literal["best_fit", "none"] = "best_fit"


class Batches(Iterator[Batch]):
    """The training batches that process `process` of `processes` makes: its rows of every global
    batch.

    With one process it stops after the last epoch. With several it goes on with rows of padding
    once its own documents are used up, because the others may not be there yet: all stop when the
    weights of the global batch sum to zero.
    """

    def __init__(
        self, config: Config, tokenizer: Tokenizer | None, process: int = 0, processes: int = 1
    ) -> None:
        mine = share(config.batch_size, process, processes)
        records = [
            _records(entry, config, tokenizer, number)
            for number, entry in enumerate(config.sources)
        ]
        plan = _plan(config, records)
        self.max_token_id = max(_max_token_ids(config, tokenizer))
        self._files = [file for entry in config.sources for file in entry.files()]
        self._fingerprint = {
            **config.model_dump(
                mode="json", include={"batch_size", "length", "seed", "order", "long", "pack"}
            ),
            "weights": [entry.weight for entry in config.sources],
            "records": [len(entry) for entry in records],
            "bytes": [entry.bytes for entry in records],
            "vocab_size": self.max_token_id + 1,
            "files": [fingerprint(file) for file in self._files],
        }
        rows = _Rows(plan, mine, ends=processes == 1)
        prefetch = grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=PREFETCH)
        # grain's iterator must go before the interpreter's modules do: its destructor needs them
        self._open = [iter(prefetch)]
        self._finalizer = weakref.finalize(self, _close, self._open)

    @property
    def _iterator(self) -> grain.DatasetIterator[Batch]:
        if not self._open:
            raise RuntimeError("the batches were closed")
        return self._open[0]

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Where the stream is, as JSON values: right after the last batch handed out, for the
        lanes of this process; `checkpoint.manager.unite` joins those of several."""
        state = self._iterator.get_state()
        return {
            "data": self._fingerprint,
            "batches": state["batches"],
            "lanes": state["lanes"],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state`, in however many processes, was called.

        Raises DataError naming what differs when the data is not the same, or when lanes are
        missing.
        """
        _same(state["data"], self._fingerprint, self._files)
        self._iterator.set_state({"batches": state["batches"], "lanes": state["lanes"]})

    def close(self) -> None:
        """Ends the prefetch thread; no batch comes afterwards."""
        self._finalizer()


def _close(iterators: list[grain.DatasetIterator[Batch]]) -> None:
    iterators.pop().close()


def share(rows: int, process: int, processes: int) -> range:
    """The rows of a global batch that a process makes. Raises DataError when they do not divide
    evenly."""
    if rows % processes:
        raise DataError(f"batch_size {rows} is not divisible by {processes} processes")
    each = rows // processes
    return range(process * each, (process + 1) * each)


def make_batch(rows: Sequence[Sequence[Piece]], length: int) -> Batch:
    """A batch from the pieces of its rows."""
    firsts = [piece.record for row in rows for piece in row if piece.number == 0]
    return Batch(
        arrays=fill(rows, length),
        names=tuple(tuple(piece.record.name for piece in row) for row in rows),
        begins=sum(record.begins for record in firsts),
        dropped=sum(record.dropped for record in firsts),
    )


def texts(config: Config) -> Iterator[str]:
    """The training documents as text, in file order, holdout excluded: what to train a tokenizer
    on."""
    for entry in config.sources:
        if entry.path is not None:
            documents, keep = open_source(entry, config.holdout)
            for i in keep:
                yield documents.text(int(i))


def open_source(
    entry: Source, holdout: Holdout | None, held_out: bool = False
) -> tuple[formats.Documents, np.ndarray]:
    """A source's documents, and the numbers of those to train on, or of those `held_out`."""
    by_column = holdout if holdout is not None and holdout.values else None
    label = by_column.column if by_column else None
    documents = formats.open_files(entry.files(), entry.column, label)
    if by_column is None:
        return documents, np.arange(0 if held_out else len(documents))
    wanted = set(by_column.values)
    inside = np.array([documents.label(i) in wanted for i in range(len(documents))], bool)
    return documents, np.flatnonzero(inside if held_out else ~inside)


class _Rows(grain.IterDataset[Batch]):
    """grain's view of the lanes, so that its prefetch thread can drive them."""

    def __init__(self, plan: Plan, mine: range, ends: bool) -> None:
        super().__init__()
        self._plan = plan
        self._mine = mine
        self._ends = ends

    def __iter__(self) -> "_RowIterator":
        return _RowIterator(self._plan, self._mine, self._ends)


class _State(dict[str, Any]):
    """A snapshot nobody changes; grain copies it for every batch, at a cost without this."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class _RowIterator(grain.DatasetIterator[Batch]):
    def __init__(self, plan: Plan, mine: range, ends: bool) -> None:
        super().__init__()
        self._length = plan.length
        self._ends = ends
        self._lanes = {str(lane): Lane(plan, lane) for lane in mine}
        self._batches = 0

    def __next__(self) -> Batch:
        rows = [lane.next_row() for lane in self._lanes.values()]
        if self._ends and not any(rows):
            raise StopIteration
        self._batches += 1
        return make_batch(rows, self._length)

    def get_state(self) -> dict[str, Any]:
        lanes = {name: lane.get_state() for name, lane in self._lanes.items()}
        return _State(batches=self._batches, lanes=lanes)

    def set_state(self, state: dict[str, Any]) -> None:
        missing = [name for name in self._lanes if name not in state["lanes"]]
        if missing:
            raise DataError(
                f"the data state holds {len(state['lanes'])} rows of the batch and not row"
                f" {missing[0]}; join the states of all processes first"
            )
        self._batches = state["batches"]
        for name, lane in self._lanes.items():
            lane.set_state(state["lanes"][name])


def _records(entry: Source, config: Config, tokenizer: Tokenizer | None, number: int) -> Records:
    limit = config.length if config.long == "truncate" else None
    if entry.synthetic is not None:
        return SyntheticRecords(entry.synthetic, config.seed + number, limit)
    if tokenizer is None:
        raise DataError(
            f"data: source {number} is text, which needs a tokenizer; set one, e.g. tokenizer=byte,"
            " or tokenizer.bpe=8192, which is trained on the data"
        )
    documents, keep = open_source(entry, config.holdout)
    if not len(keep):
        raise DataError(
            f"data: source {number} has {len(documents)} documents and all are held out"
        )
    span = None if limit is not None else max(BYTES_A_SLOT * config.length, SMALLEST_SPAN)
    return TextRecords(documents, tokenizer, keep, span, limit)


def _plan(config: Config, records: Sequence[Records]) -> Plan:
    ordered: list[grain.MapDataset[Record]] = []
    for number, entry in enumerate(records):
        dataset = grain.MapDataset.source(entry)
        if config.order == "shuffled":
            # grain adds the epoch to the seed, so seeds of runs and sources must lie far apart
            dataset = dataset.shuffle(seed=(config.seed * 2654435761 + number * 40503) % 2**32)
        ordered.append(dataset.repeat(config.epochs))
    # `weight` is a share of bytes; grain deals out records
    rates = [1.0]
    if len(records) > 1:
        entries = zip(config.sources, records, strict=True)
        rates = [entry.weight / record.typical_bytes() for entry, record in entries]
    stream = ordered[0] if len(ordered) == 1 else grain.MapDataset.mix(ordered, rates)
    sizes = [len(entry) * sum(rates) / rate for entry, rate in zip(records, rates, strict=True)]

    def record(index: int) -> Record:
        found = stream[index]
        if found is None:  # grain's word for a filtered element; nothing here filters
            raise IndexError(index)
        return found

    return Plan(
        record=record,
        total=len(stream),
        epoch=max(int(min(sizes)), 1),
        lanes=config.batch_size,
        length=config.length,
        seed=config.seed,
        shuffled=config.order == "shuffled",
        packed=config.pack == "best_fit",
    )


def _max_token_ids(config: Config, tokenizer: Tokenizer | None) -> Iterator[int]:
    for entry in config.sources:
        if entry.synthetic is not None:
            yield entry.synthetic.vocab_size - 1
        elif tokenizer is not None:
            yield tokenizer.vocab_size - 1


def _same(saved: dict[str, Any], now: dict[str, Any], files: Sequence[Path]) -> None:
    """Raises DataError unless the saved fingerprint, of which an older one has fewer keys, is now's
    and so each of `files` as it was."""
    differing = [
        f"{key} was {saved[key]}, is {now[key]}"
        for key in now
        if key != "files" and key in saved and saved[key] != now[key]
    ]
    before = saved.get("files", now["files"])
    if len(before) != len(files):
        differing.append(f"there were {len(before)} files, there are {len(files)}")
    else:
        hashes = zip(files, before, now["files"], strict=True)
        changed = [str(file) for file, was, is_now in hashes if was != is_now]
        differing += [f"the content of {file} is another" for file in changed[:5]]
        differing += [f"so is that of {len(changed) - 5} more files"] if len(changed) > 5 else []
    if differing:
        raise DataError(
            f"the data is not what it was when the state was saved: {'; '.join(differing)}. Put it "
            "back to go on, or choose another `directory` to begin anew"
        )
