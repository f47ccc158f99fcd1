"""Tensors by name, whatever file they come from, and other spellings of a checkpoint: names that
lack a prefix or bear one more, weights in MXFP4."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from ropewalk.core.errors import ModelError
from ropewalk.core.log import log
from ropewalk.core.paths import matches

# Where a model of text, pictures and sound keeps what is not its language model.
_OTHER_SENSES = (
    "vision_tower.*", "vision_model.*", "multi_modal_projector.*", "audio_tower.*",
    "model.vision_tower.*", "model.vision_model.*", "model.multi_modal_projector.*",
    "model.visual.*", "model.audio_tower.*",
)  # fmt: skip
_BLOCKS, _SCALES = "_blocks", "_scales"
# The sixteen numbers of OCP's e2m1 format.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class Reader(Protocol):
    """A source of named tensors, such as a directory of safetensors files or a GGUF file."""

    @property
    def place(self) -> str:
        """The file or directory, as messages name it."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, known without reading one."""
        ...

    @property
    def lazy(self) -> bool:
        """Whether `read` costs nothing until the array is sliced."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, floating point. Raises ModelError when its format is unsupported."""
        ...


class ByteReader(Reader, Protocol):
    """A source of tensors of bytes too."""

    def read_bytes(self, name: str) -> np.ndarray:
        """One tensor of uint8. Raises ModelError when it is of anything else."""
        ...


class Renamed:
    """A reader whose tensors bear other names, some of them none."""

    def __init__(self, reader: Reader, names: Mapping[str, str]):
        """`names` has the name in `reader` of every tensor there is."""
        self._reader, self._names = reader, names
        self.place, self.lazy = reader.place, reader.lazy
        self.shapes = {name: reader.shapes[old] for name, old in names.items()}

    def read(self, name: str) -> np.ndarray:
        """As `Reader.read`."""
        return self._reader.read(self._names[name])


def usual(reader: Reader, wanted: Iterable[str]) -> Reader:
    """The reader under the names that are wanted, as far as one rule for all names gives them.

    A model saved without its head lacks the `model.` before them; one that is the text part of a
    larger model has `language_model.` too, and neighbours that are left out.
    """
    wanted = set(wanted)
    prefixes = {name.partition(".")[0] + "." for name in wanted}
    renamings = {
        lambda name: name,
        lambda name: name.removeprefix("language_model."),
        lambda name: name.replace("model.language_model.", "model.", 1),
        *((lambda name, prefix=prefix: f"{prefix}{name}") for prefix in prefixes),
    }
    kept = [name for name in reader.shapes if not matches(name, _OTHER_SENSES)]
    known = {rename: sum(rename(name) in wanted for name in kept) for rename in renamings}
    best = max(known, key=lambda rename: known[rename])
    if known[best] == sum(name in wanted for name in reader.shapes):
        return reader
    if len(kept) < len(reader.shapes):
        left = len(reader.shapes) - len(kept)
        log.warning("%s: %d tensors beside the text model are left out", reader.place, left)
    return Renamed(reader, {best(name): name for name in kept})


class Mxfp4:
    """A reader of weights in OCP's MXFP4, blocks of 32 numbers of four bits under one power of two,
    as float32: `X_blocks` uint8 [..., o, g, 16] and `X_scales` uint8 [..., o, g] become `X`
    [..., 32 g, o]."""

    lazy = False

    def __init__(self, reader: ByteReader):
        self._reader = reader
        self.place = reader.place
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._packed = set()
        for name, shape in reader.shapes.items():
            bare = name.removesuffix(_BLOCKS)
            if bare != name and f"{bare}{_SCALES}" in reader.shapes:
                self._packed.add(bare)
                *lead, out, groups, half = shape if len(shape) > 2 else (*shape, 0, 0, 0)
                self.shapes[bare] = (*lead, groups * half * 2, out)
        for name, shape in reader.shapes.items():
            if name.removesuffix(_SCALES).removesuffix(_BLOCKS) not in self._packed:
                self.shapes[name] = shape

    def read(self, name: str) -> np.ndarray:
        """As `Reader.read`."""
        if name not in self._packed:
            return self._reader.read(name)
        blocks, scales = (self._reader.read_bytes(f"{name}{end}") for end in (_BLOCKS, _SCALES))
        if scales.shape != blocks.shape[:-1]:
            raise ModelError(
                f"{self.place}: `{name}{_BLOCKS}` {list(blocks.shape)} and `{name}{_SCALES}` "
                f"{list(scales.shape)} are no MXFP4 weights; a scale belongs to 16 bytes"
            )
        values = np.empty((*blocks.shape, 2), np.float32)
        values[..., 0], values[..., 1] = _E2M1[blocks & 15], _E2M1[blocks >> 4]
        values *= np.exp2(scales.astype(np.float32) - 127)[..., None, None]
        return np.swapaxes(values.reshape(*blocks.shape[:-2], -1), -1, -2)
