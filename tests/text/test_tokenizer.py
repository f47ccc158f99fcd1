import json
import os
from pathlib import Path

import pytest
import sentencepiece
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.core.errors import DataError, UserError
from ropewalk.text import bpe, parts
from ropewalk.text import tokenizer as tokenizers
from ropewalk.text.interface import StreamDecoder, Tokenizer
from tests.text.pieces import sentencepiece_model

SAMPLE = [
    "To be, or not to be: that is the question.\n\tWhether 'tis nobler in the mind to suffer\n",
    "naïve café, 日本語 and 😀 the end.\n\n  1234567 and 99 bottles\r\n",
] * 20


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("sentencepiece")
    return {
        "byte": tokenizers.load("byte"),
        "bpe": bpe.train(SAMPLE, 300),
        "sentencepiece": tokenizers.SentencePieceTokenizer(
            sentencepiece_model(folder, SAMPLE, 330), "sp"
        ),
    }


KINDS = ["byte", "bpe", "sentencepiece"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_decode_undoes_encode(kinds: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = kinds[kind]
    if kind == "sentencepiece":
        text = text.replace("\0", "").replace(
            "\u2581", ""
        )  # its mark for a space, and its terminator
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    added = int(tokenizer.vocabulary.leading_space and bool(text))
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode()) + added


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_stream_gives_the_text_whole_characters_at_a_time(
    kinds: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = kinds[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    decoder = StreamDecoder(tokenizer)
    stream = [decoder.feed(i) for i in ids] + [decoder.finish()]
    assert "".join(stream) == tokenizer.decode(ids)
    text = "".join(tokenizer.decode([i]) for i in ids)  # a byte at a time breaks characters
    if "\ufffd" not in text and not tokenizer.vocabulary.leading_space:
        assert text == "".join(stream)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_text_that_follows_another_continues_it(
    kinds: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = kinds[kind]
    ids = tokenizer.encode("Once upon a time there was a king.")
    cut = data.draw(st.integers(1, len(ids)))
    begun, rest = tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:], follows=True)
    assert begun + rest == tokenizer.decode(ids)


def test_stream_holds_an_unfinished_character_back(kinds: dict[str, Tokenizer]) -> None:
    decoder = StreamDecoder(kinds["byte"])
    assert [decoder.feed(i) for i in "é😀".encode()] == ["", "é", "", "", "", "😀"]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_saved_tokenizer_is_read_by_the_library(
    kinds: dict[str, Tokenizer], kind: str, tmp_path: Path
) -> None:
    tokenizer = kinds[kind]
    tokenizer.save(tmp_path)
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    again = tokenizers.load(tmp_path)
    for text in [*SAMPLE[:2], "", " ", "zażółć <|eos|> x"]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
        assert theirs.encode(text).ids == tokenizer.encode_prompt(text) == again.encode_prompt(text)
    assert again.roles == tokenizer.roles
    assert again.vocab_size == tokenizer.vocab_size == theirs.get_vocab_size()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert [config[f"{role}_token"] for role in ("bos", "eos", "pad")] == [
        "<|bos|>", "<|eos|>", "<|pad|>",
    ]  # fmt: skip


def test_sentencepiece_agrees_with_its_library_and_is_saved_unchanged(
    kinds: dict[str, Tokenizer], tmp_path: Path
) -> None:
    tokenizer = kinds["sentencepiece"]
    tokenizer.save(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for again in (tokenizers.load(tmp_path), tokenizers.load(tmp_path / "tokenizer.model")):
        for text in SAMPLE[:2]:
            ids = again.encode(text)
            assert ids == theirs.encode(text) == tokenizer.encode(text)
            assert again.decode(ids) == theirs.decode(ids) == text
            assert again.encode_prompt(text) == [theirs.bos_id(), *ids]
        assert again.eos_ids == (theirs.eos_id(),)
    assert isinstance(tokenizer, tokenizers.SentencePieceTokenizer)
    silent = tokenizers.SentencePieceTokenizer(tokenizer._model, "sp", add_bos=False)
    silent.save(tmp_path / "silent")
    assert tokenizers.load(tmp_path / "silent").encode_prompt("a") == theirs.encode("a")
    assert tokenizer.encode("a</s>b", allow_special=True).count(theirs.eos_id()) == 1
    assert theirs.eos_id() not in tokenizer.encode("a</s>b")


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_text_are_text(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = kinds[kind]
    end = tokenizer.eos_ids[0]
    text = f"a {tokenizer.spelling(end)} b"
    assert end not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert end in tokenizer.encode(text, allow_special=True)
    assert tokenizer.token_bytes()[end] == 0


def test_files_of_a_directory_are_kept_and_read(
    tmp_path: Path, kinds: dict[str, Tokenizer]
) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    kinds["bpe"].save(source)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": {"content": "<|eos|>", "lstrip": False},
        "chat_template": [
            {"name": "default", "template": "first"},
            {"name": "rag", "template": "x"},
        ],
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config, indent=7))
    (source / "special_tokens_map.json").write_text('{"pad_token": "<|pad|>"}')
    (source / "generation_config.json").write_text('{"eos_token_id": [298, 5]}')
    tokenizer = tokenizers.load(source)
    ids = {kinds["bpe"].spelling(i): i for i in kinds["bpe"].vocabulary.specials}
    assert tokenizer.roles == tokenizers.Roles(
        None,
        (ids["<|eos|>"], *(i for i in (298, 5) if i != ids["<|eos|>"])),
        ids["<|pad|>"],
        "first",
    )
    (source / "chat_template.jinja").write_text("second")
    tokenizer = tokenizers.load(source)
    assert tokenizer.chat_template == "second"
    tokenizer.save(target)
    for file in source.iterdir():
        if file.name != "generation_config.json":
            assert (target / file.name).read_bytes() == file.read_bytes()


def test_what_cannot_be_read_is_refused(tmp_path: Path, kinds: dict[str, Tokenizer]) -> None:
    with pytest.raises(UserError, match="No such file"):
        tokenizers.load(tmp_path / "nothing")
    with pytest.raises(DataError, match="no tokenizer here"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json|not a"):
        tokenizers.load(tmp_path)
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="sentencepiece"):
        tokenizers.load(tmp_path / "broken.model")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="pipe"):
        tokenizers.load(tmp_path / "pipe.json")
    kinds["bpe"].save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with pytest.raises(DataError, match=r"'<s>'.*not in the vocabulary"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").symlink_to(tmp_path.parent / "elsewhere.json")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot be read"):
        tokenizers.load(tmp_path)
    (tmp_path.parent / "elsewhere.json").write_text("{}")
    with pytest.raises(UserError, match="outside of"):
        tokenizers.load(tmp_path)


def test_ids_beyond_the_tokenizer_are_told_apart_from_text(kinds: dict[str, Tokenizer]) -> None:
    """A model's vocabulary may be larger; what its untrained rows write must not end a run."""
    ids = kinds["bpe"].encode("walk")
    assert kinds["bpe"].decode([*ids, 300, 10**6, *ids]) == "walk\ufffd\ufffdwalk"
    assert kinds["byte"].decode(["é".encode()[0], 300]) == "\ufffd\ufffd"
    for wrong in (-1, 1.0, "a", None):
        with pytest.raises(DataError, match="not a whole number"):
            kinds["bpe"].decode([wrong])  # pyright: ignore[reportArgumentType]


def test_lossy_decoder_is_refused(tmp_path: Path) -> None:
    model = library.models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    backend = library.Tokenizer(model)
    backend.decoder = library.decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="WordPiece"):
        tokenizers.load(tmp_path)


def test_metaspace_json_counts_bytes_like_its_sentencepiece_model(tmp_path: Path) -> None:
    """A converted `.json` and the `.model` it came from stand for the same bytes, id by id."""
    model = tokenizers.SentencePieceTokenizer(sentencepiece_model(tmp_path, SAMPLE, 330), "sp")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model._model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = sorted(
        (
            (vocab[piece], piece[:cut], piece[cut:])
            for piece in pieces
            if len(piece) > 1 and not (processor.is_byte(vocab[piece]) or vocab[piece] < 3)
            for cut in range(1, len(piece))
            if piece[:cut] in vocab and piece[cut:] in vocab
        ),
    )
    backend = library.Tokenizer(
        library.models.BPE(
            vocab,
            [(a, b) for _, a, b in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    normalizers, decoders = library.normalizers, library.decoders
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    converted = tokenizers.load(tmp_path / "tokenizer.json")
    assert (converted.token_bytes() == model.token_bytes()).all()
    for text in SAMPLE[:2]:
        assert converted.encode(text) == model.encode(text)
        assert converted.decode(converted.encode(text)) == text


def test_parts_give_the_tokenizer_back(kinds: dict[str, Tokenizer], tmp_path: Path) -> None:
    kinds["bpe"].save(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    size = kinds["bpe"].vocab_size
    tokens = [""] * size
    for token, i in model["vocab"].items():
        tokens[i] = token
    for i, token in kinds["bpe"].vocabulary.specials.items():
        tokens[i] = token
    described = parts.Parts(
        model="gpt2",
        tokens=tokens,
        merges=[" ".join(merge) for merge in model["merges"]],
        token_type=[parts.CONTROL if i >= size - 3 else parts.NORMAL for i in range(size)],
        pre="llama-bpe",
        add_bos=True,
    )
    rebuilt = parts.build(described, kinds["bpe"].roles)
    for text in [*SAMPLE[:2], "a<|eos|>b", "IT'S 12345"]:
        for allow in (False, True):
            assert rebuilt.encode(text, allow) == kinds["bpe"].encode(text, allow)
        assert rebuilt.encode_prompt(text) == kinds["bpe"].encode_prompt(text)
    assert (rebuilt.token_bytes() == kinds["bpe"].token_bytes()).all()


def test_sentencepiece_parts_give_the_model_back(kinds: dict[str, Tokenizer]) -> None:
    original = kinds["sentencepiece"]
    assert isinstance(original, tokenizers.SentencePieceTokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_proto=original._model)
    types = [
        parts.UNKNOWN if processor.is_unknown(i) else parts.CONTROL if processor.is_control(i)
        else parts.BYTE if processor.is_byte(i) else parts.NORMAL
        for i in range(processor.get_piece_size())
    ]  # fmt: skip
    described = parts.Parts(
        model="llama",
        tokens=[processor.id_to_piece(i) for i in range(len(types))],
        scores=[processor.get_score(i) for i in range(len(types))],
        token_type=types,
        add_bos=True,
    )
    rebuilt = parts.build(described, original.roles)
    for text in SAMPLE[:2]:
        assert rebuilt.encode(text) == original.encode(text)
        assert rebuilt.encode_prompt(text) == original.encode_prompt(text)
        assert rebuilt.decode(rebuilt.encode(text)) == text


def test_parts_that_do_not_fit_are_refused() -> None:
    roles = tokenizers.Roles()
    with pytest.raises(DataError, match=r"pre-tokenizer `klingon`.*smollm"):
        parts.build(parts.Parts("gpt2", ["a"], pre="klingon"), roles)
    with pytest.raises(DataError, match="model `bert`"):
        parts.build(parts.Parts("bert", ["a"]), roles)
    with pytest.raises(DataError, match="2 tokens but 1 token types"):
        parts.build(parts.Parts("gpt2", ["a", "b"], token_type=[1]), roles)
    with pytest.raises(DataError, match="1 tokens but 0 scores"):
        parts.build(parts.Parts("llama", ["a"]), roles)
    with pytest.raises(DataError, match="do not fit together"):
        parts.build(parts.Parts("gpt2", ["a"], merges=["b c"]), roles)
    with pytest.raises(DataError, match="special id 7 lies outside its 1 tokens"):
        parts.build(parts.Parts("gpt2", ["a"]), tokenizers.Roles(bos_id=7))
