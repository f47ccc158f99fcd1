"""The tokenizers in the wild, behind one interface: bytes, `tokenizer.json`, `.model`.

Knows nothing of models, batches or files of training text. `load` finds the right one.
"""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from ropewalk.core.errors import DataError
from ropewalk.core.storage import read_bytes, read_json
from ropewalk.text.interface import Roles, StreamDecoder, Tokenizer, Vocabulary

__all__ = [
    "HuggingFaceTokenizer",
    "Roles",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "load",
]

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_SETTINGS = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        name: str,
        roles: Roles,
        files: dict[str, bytes] | None = None,
    ) -> None:
        self._parsing = backend
        super().__init__(name, _backend_vocabulary(backend, name), roles, files or {})

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        # A second object, and not a switch flipped around a call: threads share the tokenizer.
        plain = tokenizers.Tokenizer.from_str(self._parsing.to_str())
        plain.encode_special_tokens = True
        return plain

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        return _encoded(self._parsing if allow_special else self._plain, text, False)

    def encode_prompt(self, text: str) -> list[int]:
        """See `Tokenizer.encode_prompt`; the post-processor of the file is the rule."""
        return _encoded(self._parsing, text, True)

    def _model_file(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._parsing.to_str(pretty=True).encode()}

    def _model_config(self) -> dict[str, Any]:
        return {"tokenizer_class": "PreTrainedTokenizerFast"}


def _encoded(backend: tokenizers.Tokenizer, text: str, add_special: bool) -> list[int]:
    # Of several texts, unlike of one, other threads run on meanwhile.
    return backend.encode_batch_fast([text], add_special_tokens=add_special)[0].ids


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model`, run by the `sentencepiece` library."""

    def __init__(
        self,
        model: bytes,
        name: str,
        roles: Roles | None = None,
        add_bos: bool = True,
        files: dict[str, bytes] | None = None,
    ) -> None:
        self._add_bos = add_bos
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"{name}: not a sentencepiece model: {error}") from None
        own = self._processor
        read = Roles(
            bos_id=own.bos_id() if own.bos_id() >= 0 else None,
            eos_ids=(own.eos_id(),) if own.eos_id() >= 0 else (),
            pad_id=own.pad_id() if own.pad_id() >= 0 else None,
        )
        super().__init__(name, self._read_vocabulary(), roles or read, files or {})

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        if not allow_special:
            return self._processor.encode(text)
        ids: list[int] = []
        ids_by_spelling = {spelling: i for i, spelling in self.vocabulary.specials.items()}
        for part in _split_keeping(text, list(ids_by_spelling)):
            ids += (
                [ids_by_spelling[part]] if part in ids_by_spelling else self._processor.encode(part)
            )
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """See `Tokenizer.encode_prompt`."""
        bos = [self.bos_id] if self._add_bos and self.bos_id is not None else []
        return bos + self.encode(text, allow_special=True)

    def _model_file(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model}

    def _model_config(self) -> dict[str, Any]:
        # `legacy`, in Hugging Face's sense, is what the sentencepiece library does with blanks
        kind = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
        kind["add_prefix_space"] = self.vocabulary.leading_space
        return {**kind, "add_bos_token": self._add_bos, "add_eos_token": False}

    def _read_vocabulary(self) -> Vocabulary:
        processor = self._processor
        pieces: list[bytes] = []
        specials: dict[int, str] = {}
        for i in range(processor.get_piece_size()):
            piece = processor.id_to_piece(i)
            if processor.is_byte(i):
                pieces.append(bytes([int(piece[3:5], 16)]))
            elif processor.is_control(i) or processor.is_unknown(i):
                pieces.append(b"")
                specials[i] = piece
            else:
                pieces.append(piece.replace("\u2581", " ").encode())
        probe = processor.encode("a")
        return Vocabulary(pieces, specials, bool(probe) and pieces[probe[0]].startswith(b" "))


def byte_tokenizer() -> HuggingFaceTokenizer:
    """Ids 0-255 are the bytes of UTF-8; 256, 257, 258 are BOS, EOS and padding."""
    alphabet = byte_alphabet()
    vocab = {alphabet[byte]: byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return finish_byte_level(backend, "byte")


def finish_byte_level(backend: tokenizers.Tokenizer, name: str) -> HuggingFaceTokenizer:
    """Adds to a byte-level model what all of ours share: BOS, EOS, padding, decoder, BOS before
    a prompt."""
    backend.add_special_tokens([BOS, EOS, PAD])
    ids = backend.get_vocab(with_added_tokens=True)
    bos, eos, pad = ids[BOS], ids[EOS], ids[PAD]
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bos)]
    )
    return HuggingFaceTokenizer(backend, name, Roles(bos_id=bos, eos_ids=(eos,), pad_id=pad))


def load(source: str | Path) -> Tokenizer:
    """The tokenizer named by `byte`, a `tokenizer.json`, a `.model` file, or a directory with
    either.

    Raises a UserError when there is none, or its files contradict each other.
    """
    if str(source) == "byte":
        return byte_tokenizer()
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_directory(path)
    content = read_bytes(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(content, str(path))
    return _from_json(content, str(path), {}, {}, {})


def _load_directory(path: Path) -> Tokenizer:
    files = {name: read_bytes(path / name, path) for name in FILES if os.path.lexists(path / name)}
    config, generation, special = (
        read_json(path / name, path) if os.path.lexists(path / name) else {} for name in _SETTINGS
    )
    config = {**special, **config}
    if "tokenizer.json" in files:
        return _from_json(files["tokenizer.json"], str(path), config, generation, files)
    if "tokenizer.model" in files:
        plain = SentencePieceTokenizer(files["tokenizer.model"], str(path))
        ids = {spelling: i for i, spelling in plain.vocabulary.specials.items()}
        added = {
            int(i): _content(token) for i, token in config.get("added_tokens_decoder", {}).items()
        }
        beyond = [f"{i} {token!r}" for i, token in sorted(added.items()) if i >= plain.vocab_size]
        if beyond:
            raise DataError(
                f"{path}: tokenizer_config.json adds {beyond[0]} and {len(beyond) - 1} more"
                f" beyond the {plain.vocab_size} pieces of tokenizer.model; give a directory"
                " with a tokenizer.json"
            )
        roles = _roles(config, generation, files, ids, plain.roles, str(path))
        add_bos = bool(config.get("add_bos_token", True))
        return SentencePieceTokenizer(files["tokenizer.model"], str(path), roles, add_bos, files)
    raise DataError(f"{path}: no tokenizer here; a tokenizer.json or a tokenizer.model is needed")


def _from_json(
    content: bytes,
    name: str,
    config: dict[str, Any],
    generation: dict[str, Any],
    files: dict[str, bytes],
) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{name}: not a tokenizer.json that can be read: {error}") from None
    backend.no_padding()
    backend.no_truncation()
    ids = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    first = backend.encode("", add_special_tokens=True).ids[
        :1
    ]  # what the post-processor puts in front
    bos = first[0] if first and first[0] in added else None
    return HuggingFaceTokenizer(
        backend, name, _roles(config, generation, files, ids, Roles(bos_id=bos), name), files
    )


def _roles(
    config: dict[str, Any],
    generation: dict[str, Any],
    files: dict[str, bytes],
    ids: dict[str, int],
    otherwise: Roles,
    name: str,
) -> Roles:
    """The roles that a directory's configuration files give, with those of `otherwise` where
    they are silent."""
    found: dict[str, int | None] = {}
    for role, known in (("bos", otherwise.bos_id), ("eos", None), ("pad", otherwise.pad_id)):
        token = _content(config.get(f"{role}_token"))
        if token is not None and token not in ids:
            raise DataError(
                f"{name}: {role}_token {token!r} of its configuration is not in the vocabulary"
            )
        silent = f"{role}_token" not in config
        found[role] = ids[token] if token is not None else known if silent else None
    ends = generation.get("eos_token_id") or []
    ends = ends if isinstance(ends, list) else [ends]
    if found["eos"] is not None:
        ends = [found["eos"], *ends]
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if "chat_template.jinja" in files:
        try:
            template = files["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{name}/chat_template.jinja: is not UTF-8: {error}") from None
    return Roles(
        found["bos"], tuple(dict.fromkeys(ends)) or otherwise.eos_ids, found["pad"], template
    )


def _backend_vocabulary(backend: tokenizers.Tokenizer, name: str) -> Vocabulary:
    added = backend.get_added_tokens_decoder()
    ids = backend.get_vocab(with_added_tokens=True)
    kinds = _decoder_kinds(backend.decoder)
    pieces = [b""] * (max(ids.values(), default=-1) + 1)
    if "ByteLevel" in kinds:
        from_char = {char: byte for byte, char in byte_alphabet().items()}

        def read(token: str) -> bytes:
            if all(char in from_char for char in token):
                return bytes(from_char[char] for char in token)
            return token.encode()

    elif kinds & {"ByteFallback", "Metaspace", "Replace"}:

        def read(token: str) -> bytes:
            if len(token) == 6 and token.startswith("<0x"):
                return bytes([int(token[3:5], 16)])
            return token.replace("\u2581", " ").encode()

    else:
        raise DataError(
            f"{name}: its decoder ({', '.join(sorted(kinds)) or 'none'}) does not keep the bytes of"
            " the text; byte-level and sentencepiece-like tokenizers are supported"
        )
    for token, i in ids.items():
        if i not in added:
            pieces[i] = read(token)
    for i, token in added.items():
        if not token.special:
            pieces[i] = token.content.encode()
    probe = backend.encode("a", add_special_tokens=False).ids
    leading = bool(probe) and pieces[probe[0]].startswith(b" ")
    return Vocabulary(pieces, {i: t.content for i, t in added.items() if t.special}, leading)


def _decoder_kinds(decoder: Any) -> set[str]:
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {part["type"] for part in state.get("decoders", [state])}


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for every byte, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(rest)
    }


def _split_keeping(text: str, separators: list[str]) -> list[str]:
    parts = [text]
    for separator in sorted(separators, key=len, reverse=True):
        parts = [
            piece
            for part in parts
            for piece in (
                [part] if part in separators else _interleaved(part.split(separator), separator)
            )
        ]
    return [part for part in parts if part]


def _interleaved(parts: list[str], separator: str) -> list[str]:
    return [piece for part in parts for piece in (separator, part)][1:]


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
