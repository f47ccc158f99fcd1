"""What a GGUF file says of a sentencepiece model beside its pieces. The rest of `parts` is tested
beside the tokenizers that it makes."""

from typing import Any

import pytest

from ropewalk.core.errors import DataError
from ropewalk.text import parts
from ropewalk.text.interface import Roles, Tokenizer
from ropewalk.text.tokenizer import load

# Two blanks, and a tag, that are never cut; "▁a" and "ab" are merged.
PIECES = [
    ("<unk>", parts.CONTROL), ("<bos>", parts.CONTROL), ("<eos>", parts.CONTROL),
    ("<end_of_turn>", parts.CONTROL), ("  ", parts.USER_DEFINED), ("<b>", parts.USER_DEFINED),
    ("▁", parts.NORMAL), ("a", parts.NORMAL), ("b", parts.NORMAL), ("<", parts.NORMAL),
    (">", parts.NORMAL), ("▁a", parts.NORMAL), ("ab", parts.NORMAL),
]  # fmt: skip
ROLES = Roles(bos_id=1, eos_ids=(2, 3))


def described(**more: Any) -> parts.Parts:
    tokens, kinds = zip(*PIECES, strict=True)
    scores = [-float(i) for i in range(len(PIECES))]
    return parts.Parts("llama", tokens, scores=scores, token_type=kinds, **more)


def built(**more: Any) -> Tokenizer:
    return parts.build(described(unk_id=0, add_space_prefix=False, **more), ROLES)


def test_pieces_that_are_never_cut_match_the_text_as_it_is() -> None:
    """Their blanks are not escaped in the file, unlike those of other pieces."""
    tokenizer = built()
    assert tokenizer.encode("a  <b>ab a") == [7, 4, 5, 12, 11]
    assert tokenizer.encode("   a") == [4, 11]
    assert tokenizer.decode([7, 4, 5, 12, 11]) == "a  <b>ab a"


def test_a_file_that_is_silent_of_bos_puts_it_before_a_prompt() -> None:
    assert built().encode_prompt("a") == [1, 7]
    assert built(add_bos=False).encode_prompt("a") == [7]


def test_an_unknown_token_may_be_named_by_its_id_alone() -> None:
    assert built().encode("aXb") == [7, 0, 8]
    with pytest.raises(DataError, match="unknown token 99 is outside its 13 ids"):
        parts.build(described(unk_id=99), ROLES)


def test_the_end_of_a_turn_is_known_by_its_text() -> None:
    assert parts.end_of_turn(described()) == 3
    assert parts.end_of_turn(parts.Parts("llama", ["<end_of_turn>"], token_type=[1])) is None


def test_a_saved_tokenizer_reads_the_same(tmp_path: Any) -> None:
    """All ends too, and nothing before the first word where nothing was."""
    tokenizer = built()
    tokenizer.save(tmp_path)
    found = load(tmp_path)
    assert found.eos_ids == tokenizer.eos_ids
    for text in ("a  <b>ab a", " a", "b"):
        assert found.encode_prompt(text) == tokenizer.encode_prompt(text)
    assert '"add_prefix_space": false' in (tmp_path / "tokenizer_config.json").read_text()
