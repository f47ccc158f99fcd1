"""Hugging Face model directories, in and out: config, weights, tokenizer. No pickle is read.

Knows no family: the config is a plain dict, the weights are tensors by name.
"""

import errno
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ropewalk.checkpoint import safetensors
from ropewalk.checkpoint.readers import Mxfp4, Reader
from ropewalk.checkpoint.weights import Tensor
from ropewalk.core import dtypes
from ropewalk.core.errors import ModelError, UserError
from ropewalk.core.storage import read_json, regular_file
from ropewalk.text.tokenizer import FILES

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (*FILES, "chat_template.json")
_QUANTIZATION = "quantization_config"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Directory(NamedTuple):
    """What a model directory holds.

    Tensors are read when asked for, the tokenizer by the caller.
    """

    config: dict[str, Any]
    reader: Reader
    tensors: dict[str, safetensors.Stored]
    tokenizer_files: list[Path]
    generation_config: dict[str, Any] | None


class Tokenizer(Protocol):
    """What can write its own files, chat template included, into a directory."""

    def save(self, directory: Path, /) -> object:
        """Writes the tokenizer's files."""
        ...


def read(directory: str | Path) -> Directory:
    """Opens a model directory.

    Raises a UserError when a part is absent, unsound, quantized, or lies outside it.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ModelError(
            f"{root}: is not a directory that can be entered; a model is a directory with {CONFIG}"
        )
    config = read_config(root)
    _refuse_pickles(root)
    stored = safetensors.Reader(root)
    reader = Mxfp4(stored) if config.get(_QUANTIZATION) else stored
    present = [root / name for name in TOKENIZER_FILES if os.path.lexists(root / name)]
    for path in present:
        regular_file(path, root)
    generation = root / GENERATION_CONFIG
    generation_config = read_json(generation, root) if os.path.lexists(generation) else None
    return Directory(config, reader, stored.tensors, present, generation_config)


def read_config(directory: str | Path) -> dict[str, Any]:
    """The `config.json` of a model directory.

    Raises a UserError, also when it says that the weights are quantized.
    """
    path = Path(directory) / CONFIG
    config = read_json(path, path.parent)
    quantization = config.get(_QUANTIZATION)
    method = quantization
    if isinstance(quantization, dict):
        method = quantization.get("quant_method", quantization)
    if method not in (None, "mxfp4"):
        raise ModelError(
            f"{path}: `{_QUANTIZATION}` says the weights are {method!r:.80}, which is not "
            "supported; use a checkpoint in float32, bfloat16, float16 or mxfp4"
        )
    return config


def write(
    directory: str | Path,
    config: Mapping[str, Any],
    tensors: Sequence[Tensor],
    *,
    dtype: str = "float32",
    tokenizer: Tokenizer | Mapping[str, bytes] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = safetensors.MAX_SHARD_BYTES,
) -> Path:
    """Writes a model directory, whole or not at all; an earlier export in its place is replaced.

    `tokenizer` saves itself, or is a mapping of file names to contents. Raises ModelError when the
    directory holds anything that an export did not write, when the disk does not take it, or when a
    value overflows `dtype`.
    """
    if not isinstance(directory, str | os.PathLike):
        raise ModelError(f"a directory is named by a text or a path, not by {directory!r:.80}")
    target = Path(os.path.abspath(directory))
    check_target(target)
    spelling = "dtype" if "dtype" in config else "torch_dtype"
    config = {**config, spelling: dtypes.parse(dtype).name}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            safetensors.write(new, tensors, dtype, max_shard_bytes)
            _write_json(new / CONFIG, config)
            if generation_config is not None:
                _write_json(new / GENERATION_CONFIG, generation_config)
            if tokenizer is not None:
                _write_tokenizer(new, tokenizer)
            _sync(new)
            _swap(new, target, Path(temporary) / "old")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space" if full else "choose a directory that you may write"
        raise ModelError(f"{directory}: cannot be written: {error.strerror}; {advice}") from None
    return target


def check_target(directory: str | Path) -> None:
    """Raises ModelError unless the place is free, empty, or holds only an earlier export."""
    target = Path(directory)
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise ModelError(f"{target}: is not a directory; choose another place for the export")
    names = sorted(entry.name for entry in target.iterdir())
    weights = [name for name in names if name.endswith(".safetensors")]
    known = {CONFIG, GENERATION_CONFIG, safetensors.INDEX, *TOKENIZER_FILES, *weights}
    foreign = [name for name in names if name not in known or not (target / name).is_file()]
    foreign += [name for name in weights if name not in foreign and not _ours(target / name)]
    if names and not weights:
        foreign = foreign or names
    if foreign:
        listed = ", ".join(foreign[:5]) + (" ..." if len(foreign) > 5 else "")
        raise ModelError(
            f"{target}: holds what no export of ropewalk wrote ({listed}); choose an empty or "
            "new directory"
        )


def _ours(path: Path) -> bool:
    try:
        return safetensors.read_header(path, path.parent)[1] == safetensors.WRITER
    except UserError:
        return False


def _refuse_pickles(root: Path) -> None:
    names = sorted(entry.name for entry in root.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles and safetensors.SINGLE not in names and safetensors.INDEX not in names:
        raise ModelError(
            f"{root}: has its weights only as a pickle ({pickles[0]}), which can run code when "
            "it is read and is never read here; get the model's safetensors files, or convert it "
            "with transformers' `from_pretrained(DIR).save_pretrained(NEW_DIR)`"
        )


def _write_tokenizer(directory: Path, tokenizer: Tokenizer | Mapping[str, bytes]) -> None:
    if isinstance(tokenizer, Mapping):
        for name, content in tokenizer.items():
            if name not in TOKENIZER_FILES:
                raise ModelError(
                    f"`{name}` is not a tokenizer file; known are {', '.join(TOKENIZER_FILES)}"
                )
            (directory / name).write_bytes(content)
    else:
        tokenizer.save(directory)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sync(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _swap(new: Path, target: Path, old: Path) -> None:
    """Puts `new` in the place of `target`; a directory that was there goes to `old`."""
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
