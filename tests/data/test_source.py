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
