import os
from pathlib import Path

import pytest

from ropewalk.core.errors import DataError
from ropewalk.data import formats, source
from ropewalk.data.holdout import Heldout
from tests.data.corpora import BYTE, config


def test_the_bundled_corpus_is_whole() -> None:
    file = source.bundled("shakespeare")
    assert source.resolve("bundled:shakespeare") == [file]
    documents = formats.open_files([file], "text", "title")
    assert len(documents) == 42
    assert int(documents.bounds.sum()) == sum(len(documents.text(i).encode()) for i in range(42))
    titles = {documents.label(i) for i in range(42)}
    assert {"macbeth", "tempest", "hamlet", "sonnets"} <= titles and len(titles) == 42


def test_two_works_are_held_out() -> None:
    held = Heldout(config("bundled:shakespeare", holdout={"values": ["macbeth", "tempest"]}), BYTE)
    assert len(held.names) == 2
    begun = sum(batch.begins for batch in held)
    assert begun == 2


def test_an_unknown_corpus_names_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean `shakespeare`"):
        source.resolve("bundled:shakspeare")
    with pytest.raises(DataError, match=r"there is .*shakespeare"):
        source.resolve("bundled:x")


@pytest.mark.parametrize("pattern", ["a.txt", "*.txt", "sub/../a.txt"])
def test_a_relative_path_is_seen_from_here_and_else_from_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    here, recipe = tmp_path / "here", tmp_path / "recipe [1]"
    for folder in (here, recipe):
        (folder / "sub").mkdir(parents=True)
    monkeypatch.chdir(here)
    entry = source.Source.parse({"path": pattern}, "../recipe [1]/run.yml")
    with pytest.raises(DataError) as caught:
        entry.files()
    for part in (pattern, str(here), "recipe [1])"):
        assert part in str(caught.value)
    (recipe / "a.txt").write_text("of the recipe")
    assert [file.read_text() for file in entry.files()] == ["of the recipe"]
    (here / "a.txt").write_text("from here")
    assert [file.read_text() for file in entry.files()] == ["from here"]
    assert source.Source.parse(entry.changes(), "../recipe [1]/run.yml") == entry


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "~old.txt").write_text("b")
    assert source.resolve(("~/a.txt", "~/a*", "~old.txt")) == [
        tmp_path / "a.txt",
        tmp_path / "a.txt",
        Path("~old.txt"),
    ]
    with pytest.raises(DataError, match=rf"data file {tmp_path}/none.txt: No such file") as caught:
        source.resolve("~/none.txt")
    assert "seen from" not in str(caught.value)


@pytest.mark.parametrize("blocks", [0.001, 1, 15.5, 16, 16.5, 200])
def test_a_fingerprint_sees_size_head_and_tail_and_any_byte_of_a_small_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: float
) -> None:
    monkeypatch.setattr(source, "BLOCK_BYTES", 1000)
    file, content = tmp_path / "a", os.urandom(int(1000 * blocks))
    file.write_bytes(content)
    found = {source.fingerprint(file)}
    places = [0, len(content) - 1]
    if blocks <= source.BLOCKS:
        places += range(0, len(content), 97)
    for place in set(places):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        fingerprint = source.fingerprint(file)
        assert fingerprint not in found
        found.add(fingerprint)
    file.write_bytes(content + b"\0")
    assert source.fingerprint(file) not in found
    file.write_bytes(content)
    assert source.fingerprint(file) in found
