"""Files of documents: .txt (one document a file), .jsonl, .parquet, .arrayrecord; .txt and .jsonl
also compressed (.gz, .bz2, .xz).

Gives random access to the UTF-8 bytes of every document. A compressed or columnar file is unpacked
once into an unnamed temporary file. Knows nothing of tokens.
"""

import bz2
import gzip
import json
import lzma
import mmap
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue] (compiled)
)

from ropewalk.core.errors import DataError

COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
SUPPORTED = ".txt, .jsonl (both also with .gz, .bz2 or .xz), .parquet, .arrayrecord"
BOM = b"\xef\xbb\xbf"  # that some editors write before UTF-8 text
_CHUNK = 8 << 20
_CACHE_BYTES = 64 << 20
_CORRUPT = (OSError, EOFError, zlib.error, lzma.LZMAError)


class Part(ABC):
    """The documents of one file.

    `bounds` int64 [documents] is the number of bytes each takes at most; `labels`, where asked for,
    the value of one more column of every document; `columns` those of the first record.
    """

    bounds: np.ndarray
    columns: Sequence[str] = ()
    labels: Sequence[str | None] | None = None

    @abstractmethod
    def text(self, i: int) -> bytes:
        """All UTF-8 bytes of a document."""

    def read(self, i: int, start: int, stop: int) -> bytes | None:
        """Some bytes of a document, or None where only `text` is quick."""
        return None

    @abstractmethod
    def name(self, i: int) -> str:
        """Where the document stands, for messages."""


class Documents:
    """The documents of several files as one numbered sequence."""

    def __init__(self, parts: list[Part]) -> None:
        self._parts = parts
        self._first = np.cumsum([0] + [len(part.bounds) for part in parts])
        self.bounds: np.ndarray = np.concatenate([part.bounds for part in parts])
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.bounds)

    def length(self, i: int) -> int:
        """The exact number of UTF-8 bytes of a document."""
        part, j = self._locate(i)
        return (
            int(part.bounds[j]) if part.read(j, 0, 0) is not None else len(self._whole(i, part, j))
        )

    def read(self, i: int, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a document."""
        part, j = self._locate(i)
        some = part.read(j, start, stop)
        return some if some is not None else self._whole(i, part, j)[start:stop]

    def text(self, i: int) -> str:
        """The whole text of a document. Raises DataError with the byte at which it is not UTF-8."""
        return decode(self.read(i, 0, self.length(i)), self.name(i), 0)

    def name(self, i: int) -> str:
        """File, and line or record, of a document."""
        part, j = self._locate(i)
        return part.name(j)

    def label(self, i: int) -> str | None:
        """The value of the extra column the files were opened with."""
        part, j = self._locate(i)
        return part.labels[j] if part.labels is not None else None

    def columns(self) -> list[str]:
        """What a label may be taken from: the columns of the files' first records, and `file`."""
        return list(
            dict.fromkeys([name for part in self._parts for name in part.columns] + ["file"])
        )

    def _locate(self, i: int) -> tuple[Part, int]:
        which = int(np.searchsorted(self._first, i, side="right")) - 1
        return self._parts[which], i - int(self._first[which])

    def _whole(self, i: int, part: Part, j: int) -> bytes:
        if i in self._cache:
            self._cache.move_to_end(i)
            return self._cache[i]
        text = part.text(j)
        self._cache[i] = text
        self._cached_bytes += len(text)
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= len(self._cache.popitem(last=False)[1])
        return text


def open_files(files: Iterable[Path], column: str, label: str | None = None) -> Documents:
    """Opens files of any supported format, their text under `column`.

    `label` names one more column to keep in memory for every document (`file` is the file's name).
    Raises DataError when a file cannot be read; the first record of each is read to know.
    """
    return Documents([_open(file, column, label) for file in files])


def _open(file: Path, column: str, label: str | None) -> Part:
    suffixes = file.suffixes[-2:]
    compressed = suffixes[-1] if suffixes and suffixes[-1] in COMPRESSED else None
    kind = file.suffixes[-2] if compressed and len(file.suffixes) > 1 else file.suffix
    try:
        if kind == ".txt":
            part = _spooled_text(file, compressed) if compressed else TextFile(file)
        elif kind == ".jsonl":
            part = (
                _spooled_lines(file, compressed, column, label)
                if compressed
                else JsonLines(file, column)
            )
        elif kind == ".parquet" and not compressed:
            part = _spooled_parquet(file, column, label)
        elif kind == ".arrayrecord" and not compressed:
            part = ArrayRecords(file, column)
        else:
            raise DataError(
                f"data file {file}: this kind of file is not supported; supported are {SUPPORTED}"
            )
    except _CORRUPT as error:
        raise DataError(f"data file {file}: damaged or unreadable: {error}") from None
    if not len(part.bounds):
        raise DataError(f"data file {file} holds no records")
    if label == "file":
        part.labels = [file.name] * len(part.bounds)
    elif label is not None and isinstance(part, RecordFile):
        part.labels = [_label(part.record(i), label) for i in range(len(part.bounds))]
    if isinstance(part, RecordFile):
        part.text(0)  # a wrong column shows now, not in the middle of a run
        part.columns = list(part.record(0))
    return part


class TextFile(Part):
    """A .txt file: one document, read in place."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._start = _text_start(file)
        self.bounds = np.array([file.stat().st_size - self._start], np.int64)

    def read(self, i: int, start: int, stop: int) -> bytes:
        """See `Part`."""
        return _read(self._file, self._start + start, stop - start)

    def text(self, i: int) -> bytes:
        """See `Part`."""
        return self.read(i, 0, int(self.bounds[0]))

    def name(self, i: int) -> str:
        """See `Part`."""
        return str(self._file)


class Spooled(Part):
    """Documents unpacked into an unnamed temporary file, which is mapped into memory."""

    def __init__(
        self, file: Path, documents: Iterable[tuple[int | None, bytes, str | None]], unit: str
    ) -> None:
        self._file = file
        self._unit = unit
        numbers: list[int | None] = []
        ends = [0]
        labels: list[str | None] = []
        try:
            with tempfile.TemporaryFile() as spool:
                for number, text, label in documents:
                    spool.write(text)
                    numbers.append(number)
                    labels.append(label)
                    ends.append(ends[-1] + len(text))
                spool.flush()
                size = ends[-1]
                self._bytes = (
                    mmap.mmap(spool.fileno(), size, access=mmap.ACCESS_READ) if size else b""
                )
        except OSError as error:
            if error.filename is not None or error.errno is None:
                raise
            raise DataError(
                f"data file {file}: unpacking it into {tempfile.gettempdir()} failed:"
                f" {error.strerror}; set TMPDIR to a directory with room"
            ) from None
        self._numbers = numbers
        self.labels = labels
        self._ends = np.array(ends, np.int64)
        self.bounds = np.diff(self._ends)

    def read(self, i: int, start: int, stop: int) -> bytes:
        """See `Part`."""
        first = int(self._ends[i])
        return self._bytes[first + start : min(first + stop, int(self._ends[i + 1]))]

    def text(self, i: int) -> bytes:
        """See `Part`."""
        return self.read(i, 0, int(self.bounds[i]))

    def name(self, i: int) -> str:
        """See `Part`."""
        number = self._numbers[i]
        return str(self._file) if number is None else f"{self._file}{self._unit}{number}"


class RecordFile(Part):
    """A file whose records are parsed when they are asked for."""

    @abstractmethod
    def record(self, i: int) -> dict[str, Any]:
        """One record as a mapping of columns."""


class JsonLines(RecordFile):
    """A .jsonl file: line starts are found once, lines are parsed when asked for."""

    def __init__(self, file: Path, column: str) -> None:
        self._file = file
        self._column = column
        ends = _newlines(file)
        starts = np.concatenate([[_text_start(file)], ends[:-1] + 1])
        keep = np.flatnonzero(ends - starts > 1)  # an empty line, with or without \r, is no record
        self._starts, self._lines = starts[keep], keep + 1
        self.bounds = (ends - starts)[keep]

    def record(self, i: int) -> dict[str, Any]:
        """See `RecordFile`."""
        line = _read(self._file, int(self._starts[i]), int(self.bounds[i]))
        return _parse(line, self.name(i), f"{self._file}, byte", int(self._starts[i]))

    def text(self, i: int) -> bytes:
        """See `Part`."""
        return _column(self.record(i), self._column, self.name(i))

    def name(self, i: int) -> str:
        """See `Part`."""
        return f"{self._file}:{self._lines[i]}"


class ArrayRecords(RecordFile):
    """An .arrayrecord file; its records are JSON objects if the first one is, and plain text
    otherwise."""

    def __init__(self, file: Path, column: str) -> None:
        self._file = file
        self._column = column
        try:
            self._reader = array_record_module.ArrayRecordReader(str(file))
            sizes = [len(record) for record in self._every_record()]
            first = self._reader.read([0])[0] if sizes else b""
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f"data file {file}: not an ArrayRecord file that can be read: {error}"
            ) from None
        self.bounds = np.array(sizes, np.int64)
        try:
            self._json = isinstance(json.loads(first), dict)
        except ValueError:
            self._json = False

    def _every_record(self) -> Iterator[bytes]:
        count = self._reader.num_records()
        for start in range(0, count, 1024):
            yield from self._reader.read(start, min(start + 1024, count))

    def record(self, i: int) -> dict[str, Any]:
        """See `RecordFile`."""
        if not self._json:
            return {}
        return _parse(self._reader.read([i])[0], self.name(i), f"{self.name(i)}, byte", 0)

    def text(self, i: int) -> bytes:
        """See `Part`."""
        if not self._json:
            return self._reader.read([i])[0]
        return _column(self.record(i), self._column, self.name(i))

    def name(self, i: int) -> str:
        """See `Part`."""
        return f"{self._file} record {i}"


def decode(data: bytes, name: str, offset: int) -> str:
    """Bytes that stand at `offset` of the document `name`, as text. Raises DataError on broken
    UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"data {name}: not valid UTF-8 at byte {offset + error.start} of the text"
            f" (0x{data[error.start]:02x}); convert the file to UTF-8"
        ) from None


def _spooled_text(file: Path, compressed: str) -> Spooled:
    with COMPRESSED[compressed](file) as stream:
        return Spooled(file, [(None, stream.read().removeprefix(BOM), None)], "")


def _spooled_lines(file: Path, compressed: str, column: str, label: str | None) -> Spooled:
    columns: list[str] = []

    def documents(stream: IO[bytes]) -> Iterator[tuple[int, bytes, str | None]]:
        offset = 0
        for number, whole in enumerate(stream, 1):
            line = whole if offset else whole.removeprefix(BOM)
            offset += len(whole)
            if line.strip():
                name = f"{file}:{number}"
                record = _parse(line, name, f"{file}, unpacked byte", offset - len(line))
                if not columns:
                    columns.extend(record)
                yield (
                    number,
                    _column(record, column, name),
                    None if label is None else _label(record, label),
                )

    with COMPRESSED[compressed](file) as stream:
        part = Spooled(file, documents(stream), ":")
    part.columns = columns
    return part


def _spooled_parquet(file: Path, column: str, label: str | None) -> Spooled:
    import pyarrow.parquet  # start-up time

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            return _spooled_table(file, table, column, label)
    except pyarrow.ArrowException as error:
        raise DataError(f"data file {file}: damaged or unreadable: {error}") from None


def _spooled_table(file: Path, table: Any, column: str, label: str | None) -> Spooled:
    names = table.schema_arrow.names
    if column not in names:
        raise _missing(column, names, str(file))
    wanted = [column] + ([label] if label in names and label != column else [])

    def documents() -> Iterator[tuple[int, bytes, str | None]]:
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=wanted):
            labels = batch.column(label).to_pylist() if label in wanted else [None] * len(batch)
            for text, value in zip(batch.column(column).to_pylist(), labels, strict=True):
                name = f"{file} row {number}"
                yield (
                    number,
                    _column({column: text}, column, name),
                    None if value is None else str(value),
                )
                number += 1

    part = Spooled(file, documents(), " row ")
    part.columns = names
    return part


def _read(file: Path, start: int, count: int) -> bytes:
    try:
        with file.open("rb") as handle:
            handle.seek(start)
            return handle.read(count)
    except OSError as error:
        raise DataError(f"data file {file}: cannot be read: {error.strerror}") from None


def _text_start(file: Path) -> int:
    """The byte at which the text of a file begins."""
    return len(BOM) if _read(file, 0, len(BOM)) == BOM else 0


def _newlines(file: Path) -> np.ndarray:
    """int64: the byte offset of the end of every line."""
    found: list[np.ndarray] = []
    offset = 0
    last = b"\n"
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + offset)
            offset += len(chunk)
            last = chunk[-1:]
    if last != b"\n":
        found.append(np.array([offset]))
    return np.concatenate(found)


def _parse(line: bytes, name: str, place: str, offset: int) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: not valid UTF-8 ({place} {offset + error.start}); convert the file to UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{name}: a record is a JSON object, this is a {type(record).__name__}")
    return record


def _column(record: dict[str, Any], column: str, name: str) -> bytes:
    if column not in record:
        raise _missing(column, list(record), name)
    text = record[column]
    if not isinstance(text, str):
        raise DataError(f"{name}: column `{column}` holds a {type(text).__name__}, not text")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name}: column `{column}`, character {error.start}: half of a surrogate pair"
        ) from None


def _missing(column: str, found: list[str], name: str) -> DataError:
    return DataError(
        f"{name}: no column `{column}`; columns found: {', '.join(found)}."
        " Set `column` of the source"
    )


def _label(record: dict[str, Any], label: str) -> str | None:
    value = record.get(label)
    return None if value is None else str(value)
