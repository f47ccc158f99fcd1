"""Evaluation data: finite, never shuffled, every token once, the same on any number
of processes."""

import difflib
from collections.abc import Iterator

import numpy as np

from ropewalk.core.errors import DataError
from ropewalk.data.formats import Documents
from ropewalk.data.pack import Lane, Plan
from ropewalk.data.pipeline import Config, make_batch, open_source, share
from ropewalk.data.records import Record, TextRecords
from ropewalk.data.stats import Batch
from ropewalk.text.tokenizer import Tokenizer


class Heldout:
    """The held-out documents as batches; every `iter` begins anew.

    Documents are tokenized whole, once, and cut into rows; a token that a row begins with is
    context there and target in the row before. The last batch is filled up with rows of weight 0.
    Each process makes its rows of every batch, and all make the same number of batches.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        batch_size: int | None = None,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self._batch_size = batch_size or config.batch_size
        self._mine = share(self._batch_size, process, processes)
        self._length = config.length
        self._records: list[Record] = []
        for documents, keep in _held_out(config):
            self._records += list(_read(documents, keep, tokenizer))
        if not any(len(record.tokens) > 1 for record in self._records):
            raise DataError(f"data: the {len(self._records)} held-out documents hold no text")

    @property
    def names(self) -> list[str]:
        """The held-out documents."""
        return [record.name for record in self._records]

    def __iter__(self) -> Iterator[Batch]:
        count = len(self._records)
        plan = Plan(
            self._records.__getitem__, count, count, 1, self._length, 0, shuffled=False, packed=True
        )
        lane = Lane(plan, 0)
        rows = [lane.next_row() for _ in range(self._batch_size)]
        while any(rows):
            yield make_batch([rows[i] for i in self._mine], self._length)
            rows = [lane.next_row() for _ in range(self._batch_size)]


def _read(documents: Documents, keep: np.ndarray, tokenizer: Tokenizer) -> Iterator[Record]:
    records = TextRecords(documents, tokenizer, keep)
    return (records[i] for i in range(len(records)))


def _held_out(config: Config) -> list[tuple[Documents, np.ndarray]]:
    holdout = config.holdout
    if holdout is None:
        raise DataError(
            "data: nothing is held out for evaluation; set `holdout` to values of a column"
            " or to a source"
        )
    if holdout.source is not None:
        if holdout.source.path is None:
            raise DataError(
                "data: a holdout source needs a `path`; synthetic tokens cannot be held out"
            )
        documents, keep = open_source(holdout.source, None)
        return [(documents, keep)]
    opened = [
        open_source(entry, holdout, held_out=True)
        for entry in config.sources
        if entry.path is not None
    ]
    found = {documents.label(int(i)) for documents, keep in opened for i in keep}
    for value in holdout.values:
        if value not in found:
            hint = _hint(value, [documents for documents, _ in opened])
            raise DataError(
                f"data: no document has `{holdout.column}` = `{value}` to hold out; {hint}"
            )
    return opened


def _hint(value: str, opened: list[Documents]) -> str:
    labels = {documents.label(i) for documents in opened for i in range(len(documents))}
    known = sorted(label for label in labels if label is not None)
    if not known:
        columns = dict.fromkeys(column for documents in opened for column in documents.columns())
        return f"no document has a value there; columns found: {', '.join(columns)}"
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.4)
    return f"did you mean `{near[0]}`?" if near else f"the column has {', '.join(known[:5])}"
