import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue] (compiled)
)

from ropewalk.core.errors import DataError
from ropewalk.data.formats import Documents, open_files
from ropewalk.data.source import resolve

TEXTS = [
    "First line.\nSecond: é 日本 😀\n",
    "",
    "x",
    '{"not": "a record"}',
    'tab\t "quote" \u2028 end',
]
TITLES = ["a", "b", None, "d", "e"]


def write(folder: Path, kind: str) -> list[Path]:
    """The documents in some format."""
    lines = "".join(
        json.dumps({"text": text, "title": title}, ensure_ascii=i % 2 == 0) + "\n"
        for i, (text, title) in enumerate(zip(TEXTS, TITLES, strict=True))
    ).encode()
    if kind.startswith(".txt"):
        files = [folder / f"{i}{kind}" for i, text in enumerate(TEXTS) if text]
        for file, text in zip(files, filter(None, TEXTS), strict=True):
            file.write_bytes(gzip.compress(text.encode()) if kind == ".txt.gz" else text.encode())
        return files
    file = folder / f"all{kind}"
    if kind.startswith(".jsonl"):
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
        file.write_bytes(pack.get(file.suffix, bytes)(lines.replace(b"\n", b"\r\n", 1) + b"\n"))
    elif kind == ".parquet":
        table = pyarrow.table({"title": TITLES, "text": TEXTS, "n": range(5)})
        pyarrow.parquet.write_table(table, file, row_group_size=2)
    else:
        writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
        records = TEXTS if kind == ".plain.arrayrecord" else lines.decode().splitlines()
        for record in [r.encode() for r in records]:
            writer.write(record)
        writer.close()
    return [file]


KINDS = [
    ".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".parquet", ".arrayrecord",
    ".plain.arrayrecord",
]  # fmt: skip


def every_text(documents: Documents) -> list[str]:
    return [documents.text(i) for i in range(len(documents))]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    documents = open_files(write(tmp_path, kind), "text")
    assert every_text(documents) == [t for t in TEXTS if t or not kind.startswith(".txt")]
    for i in range(len(documents)):
        whole = documents.text(i).encode()
        assert documents.length(i) == len(whole) <= documents.bounds[i]
        assert documents.read(i, 2, 7) == whole[2:7]
        assert documents.read(i, 0, 10**6) == whole
        assert str(tmp_path) in documents.name(i)


@pytest.mark.parametrize("kind", [k for k in KINDS if "txt" not in k and "plain" not in k])
def test_labels_are_the_other_column(tmp_path: Path, kind: str) -> None:
    documents = open_files(write(tmp_path, kind), "text", "title")
    assert [documents.label(i) for i in range(5)] == TITLES
    assert sorted(set(documents.columns()) - {"n"}) == ["file", "text", "title"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    end = ".gz" if pack is gzip.compress else ""
    for name, content, texts in (
        ("a.txt", "one é\n", ["one é\n"]),
        ("a.jsonl", '{"text": "one"}\n{"text": "\ufefftwo"}\n', ["one", "\ufefftwo"]),
        ("b.jsonl", '\n{"text": "one"}', ["one"]),
    ):
        (tmp_path / f"{name}{end}").write_bytes(pack(content.encode("utf-8-sig")))
        documents = open_files([tmp_path / f"{name}{end}"], "text")
        assert every_text(documents) == texts
        assert documents.length(0) == len(documents.text(0).encode())
    bad = tmp_path / f"c.jsonl{end}"
    bad.write_bytes(pack('{"text": "é'.encode("utf-8-sig") + b'\xff"}'))
    assert f"byte {3 + 12}" in first_error(bad)


def test_files_are_joined_in_order_and_named(tmp_path: Path) -> None:
    write(tmp_path, ".jsonl")
    write(tmp_path, ".txt")
    files = resolve((str(tmp_path / "*.jsonl"), str(tmp_path / "*.txt")))
    documents = open_files(files, "text", "file")
    assert every_text(documents) == [*TEXTS, *filter(None, TEXTS)]
    assert documents.name(1) == f"{tmp_path}/all.jsonl:2"
    assert documents.label(0) == "all.jsonl" and documents.label(5) == "0.txt"
    assert np.array_equal(documents.bounds[5:], [len(t.encode()) for t in TEXTS if t])


def test_blank_lines_are_no_records_but_count_as_lines(tmp_path: Path) -> None:
    for name, pack in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)):
        file = tmp_path / name
        file.write_bytes(pack(b'\n{"text": "one"}\n\n\r\n{"text": "two"}'))
        documents = open_files([file], "text")
        assert every_text(documents) == ["one", "two"]
        assert documents.name(1) == f"{file}:5"


def first_error(file: Path, column: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        every_text(open_files(resolve(str(file)), column))
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_records_are_named_by_file_and_line(tmp_path: Path, suffix: str) -> None:
    pack = gzip.compress if suffix else bytes
    good = b'{"text": "fine", "id": 1}\n'
    for bad, message in (
        (b'{"text": "x"', "not valid JSON"),
        (b'["text"]', "a record is a JSON object, this is a list"),
        (b'{"body": "x", "id": 2}', "no column `text`; columns found: body, id"),
        (b'{"text": 5}', "column `text` holds a int, not text"),
        (b'{"text": null}', "column `text` holds a NoneType, not text"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "a\xff"}', f"byte {len(good) + 11}"),
        (b"[" * 100000, "not valid JSON"),
    ):
        file = tmp_path / f"a.jsonl{suffix}"
        file.write_bytes(pack(good + bad + b"\n"))
        error = first_error(file)
        assert f"{file}:2" in error and message in error


def test_wrong_column_shows_at_once(tmp_path: Path) -> None:
    for kind in (".jsonl", ".jsonl.gz", ".parquet", ".arrayrecord"):
        files = write(tmp_path, kind)
        with pytest.raises(DataError, match=r"no column `body`; columns found: .*text"):
            open_files(files, "body")
    number = tmp_path / "n.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), number)
    assert "holds a int, not text" in first_error(number)


def test_broken_utf8_is_named_by_file_and_byte(tmp_path: Path) -> None:
    for name, pack in (("a.txt", bytes), ("a.txt.gz", gzip.compress)):
        file = tmp_path / name
        file.write_bytes(pack(b"x" * 5000 + b"\xff rest"))
        error = first_error(file)
        assert str(file) in error and "byte 5000" in error and "0xff" in error


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    content = os.urandom(3000)
    cut = gzip.compress(json.dumps({"text": content.hex()}).encode())[:1000]
    flipped = bytearray(gzip.compress(b'{"text": "abc"}'))
    flipped[-6] ^= 1
    for name, data in (
        ("cut.jsonl.gz", cut),
        ("flipped.jsonl.gz", bytes(flipped)),
        ("random.txt.gz", content),
        ("random.jsonl.bz2", content),
        ("random.jsonl.xz", content),
        ("random.parquet", content),
        ("random.arrayrecord", content),
    ):
        file = tmp_path / name
        file.write_bytes(data)
        assert str(file) in first_error(file)


def test_what_is_no_file_of_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    for name, message in (
        ("missing.txt", "No such file"),
        ("*.nothing", "no file matches"),
        ("", "is a directory"),
        ("empty.txt", "is empty"),
        ("pipe.jsonl", "is a pipe"),
        ("a.csv", "not supported; supported are .txt"),
        ("blank.jsonl", "holds no records"),
    ):
        error = first_error(tmp_path / name)
        assert message in error and str(tmp_path) in error
    with pytest.raises(DataError, match="empty list"):
        resolve(())


def test_a_file_that_vanishes_is_an_error_of_the_user(tmp_path: Path) -> None:
    files = write(tmp_path, ".jsonl")
    documents = open_files(files, "text")
    files[0].unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        documents.text(1)
