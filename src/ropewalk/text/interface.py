"""What every tokenizer can do, and how ids become text, one by one or all together.

Decoding is the same for every kind: each id stands for some bytes (none for a special token), and
the text is their concatenation.
"""

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.core.errors import DataError
from ropewalk.core.storage import write_atomic

_UNKNOWN = "\ufffd".encode()


@dataclass(frozen=True)
class Roles:
    """Which ids play a part that is not text, and the template of a conversation."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class Vocabulary:
    """What each id stands for: its bytes (empty when special), and the spelling of special ids."""

    pieces: Sequence[bytes]
    specials: dict[int, str] = field(default_factory=dict)
    leading_space: bool = False  # encoding puts a space before the text, which decoding takes away


class Tokenizer(ABC):
    """Text to ids and back; see `load`, `bpe.train` and `parts.build` for where one comes from."""

    def __init__(
        self, name: str, vocabulary: Vocabulary, roles: Roles, files: dict[str, bytes]
    ) -> None:
        self.name = name
        self.vocabulary = vocabulary
        self.roles = roles
        self._files = files
        highest = max(
            (i for i in (roles.bos_id, roles.pad_id, *roles.eos_ids) if i is not None), default=-1
        )
        if highest >= len(vocabulary.pieces):
            raise DataError(
                f"tokenizer {name}: special id {highest} lies outside its"
                f" {len(vocabulary.pieces)} tokens"
            )

    @abstractmethod
    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of a text, without BOS or EOS.

        The spelling of a special token inside the text is plain text unless `allow_special`, so
        that nobody can forge a turn of a conversation or an end of document by writing it.
        """

    @abstractmethod
    def encode_prompt(self, text: str) -> list[int]:
        """The ids as the tokenizer's author prescribes for a prompt: with BOS where that is the
        rule."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return len(self.vocabulary.pieces)

    @property
    def bos_id(self) -> int | None:
        """The id that begins a document, if there is one."""
        return self.roles.bos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a document or an answer; the first is the one to write."""
        return self.roles.eos_ids

    @property
    def pad_id(self) -> int | None:
        """The id of padding, if there is one."""
        return self.roles.pad_id

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of a conversation, if there is one."""
        return self.roles.chat_template

    def decode(self, ids: Sequence[int], follows: bool = False) -> str:
        """The text of some ids: special tokens are left out; broken UTF-8, and ids beyond the
        tokenizer's, become U+FFFD. What `follows` other text keeps a space at its beginning."""
        decoder = StreamDecoder(self, follows)
        return "".join(decoder.feed(i) for i in ids) + decoder.finish()

    def spelling(self, token: int) -> str:
        """How a special id is written inside text (`""` for None and for ids that are not
        special)."""
        return self.vocabulary.specials.get(token, "")

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        counts = np.array([len(piece) for piece in self.vocabulary.pieces], np.int32)
        counts.flags.writeable = False
        return counts

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: how many UTF-8 bytes of text each id stands for; 0 for special
        tokens."""
        return self._token_bytes

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer's files; what was read from files is written back byte for byte."""
        for name, content in {**self._default_files(), **self._files}.items():
            write_atomic(Path(directory) / name, content)

    @abstractmethod
    def _model_file(self) -> dict[str, bytes]:
        """The file, by name, that holds the vocabulary."""

    @abstractmethod
    def _model_config(self) -> dict[str, Any]:
        """What tokenizer_config.json says so that others read the file as it is read here."""

    def _default_files(self) -> dict[str, bytes]:
        """What `save` writes where no original file is known."""
        files = (
            {} if {"tokenizer.json", "tokenizer.model"} & self._files.keys() else self._model_file()
        )
        if "tokenizer_config.json" not in self._files:
            eos = self.eos_ids[0] if self.eos_ids else None
            config = {**self._model_config(), "clean_up_tokenization_spaces": False}
            for role, token in (("bos", self.bos_id), ("eos", eos), ("pad", self.pad_id)):
                if token is not None:
                    config[f"{role}_token"] = self.spelling(token)
            if self.chat_template is not None:
                config["chat_template"] = self.chat_template
            files["tokenizer_config.json"] = json.dumps(
                config, indent=2, ensure_ascii=False
            ).encode()
        if len(self.eos_ids) > 1:  # the other file has room for one
            files["generation_config.json"] = json.dumps({"eos_token_id": self.eos_ids}).encode()
        return files


class StreamDecoder:
    """Ids one by one to text; a character comes out whole, and all pieces together equal
    `decode`."""

    def __init__(self, tokenizer: Tokenizer, follows: bool = False) -> None:
        self._pieces = tokenizer.vocabulary.pieces
        self._strip = tokenizer.vocabulary.leading_space and not follows
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that is certain after one more id; may be empty.

        An id beyond the tokenizer's, of which a model's vocabulary may have more, becomes U+FFFD.
        Raises DataError on what cannot be an id.
        """
        if not isinstance(token, int | np.integer) or token < 0:
            raise DataError(f"token id {token!r} is not a whole number from 0 on")
        piece = self._pieces[token] if token < len(self._pieces) else _UNKNOWN
        if self._strip and piece:
            piece = piece.removeprefix(b" ")
            self._strip = False
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._utf8.decode(b"", final=True)


def checked(text: str) -> str:
    """The text as it came. Raises DataError unless it is one that UTF-8 can write."""
    if not isinstance(text, str):
        raise DataError(f"a text is expected, not {text!r:.80} ({type(text).__name__})")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"not a text: {error}; give it as UTF-8") from None
    return text
