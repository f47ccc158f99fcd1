"""Model directories: what is written is read back, what could lose or run things is refused."""

import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ropewalk.checkpoint import hf, weights
from ropewalk.checkpoint.safetensors import INDEX, SINGLE
from ropewalk.core.errors import ModelError, UserError
from tests.checkpoint.tiny import RULES, random, table, tensors

CONFIG = {"model_type": "tiny", "hidden_size": 64, "torch_dtype": "float32"}
TOKENIZER = {"tokenizer.json": b"{}", "chat_template.jinja": "{{ 'é' }}".encode()}


def export(directory: Path, **options: Any) -> dict[str, np.ndarray]:
    specs = table()
    params = random(specs)
    hf.write(directory, CONFIG, weights.export(params, RULES, specs), **options)
    return params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_shard_bytes", [50_000, 5_000_000_000])
def test_export_then_import(tmp_path: Path, dtype: str, max_shard_bytes: int) -> None:
    params = export(
        tmp_path / "model",
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer=TOKENIZER,
        generation_config={"eos_token_id": 2},
    )
    config, reader, _, tokenizer_files, generation_config = hf.read(tmp_path / "model")
    assert config == CONFIG | {"torch_dtype": dtype}
    assert {path.name: path.read_bytes() for path in tokenizer_files} == TOKENIZER
    assert generation_config == {"eos_token_id": 2}
    assert (tmp_path / "model" / INDEX).exists() == (max_shard_bytes == 50_000)
    loaded = weights.load_into(reader, RULES, table())
    for path, array in loaded.items():
        expected = params[path].astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(array, expected, err_msg=path)
    assert os.listdir(tmp_path) == ["model"]


def test_the_newer_spelling_of_dtype_is_kept(tmp_path: Path) -> None:
    hf.write(tmp_path / "m", {"dtype": "float32"}, tensors({"a": np.ones(1)}), dtype="bf16")
    assert hf.read_config(tmp_path / "m") == {"dtype": "bfloat16"}


def test_a_tokenizer_saves_itself(tmp_path: Path) -> None:
    class Tokenizer:
        def save(self, directory: Path, /) -> None:
            (directory / "tokenizer.json").write_text("{}")

    export(tmp_path / "model", tokenizer=Tokenizer())
    assert [path.name for path in hf.read(tmp_path / "model").tokenizer_files] == ["tokenizer.json"]


def test_an_earlier_export_is_replaced_whole(tmp_path: Path) -> None:
    export(tmp_path / "model", max_shard_bytes=50_000, tokenizer=TOKENIZER)
    export(tmp_path / "model", dtype="bfloat16")
    assert sorted(os.listdir(tmp_path / "model")) == [hf.CONFIG, SINGLE]
    assert os.listdir(tmp_path) == ["model"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    export(tmp_path)
    assert hf.read(tmp_path).config["hidden_size"] == 64


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("foreign", ["notes.txt", "checkpoints/", SINGLE, "config.json only"])
def test_what_no_export_wrote_is_never_replaced(tmp_path: Path, foreign: str) -> None:
    if foreign == SINGLE:  # another tool's model: our names, not our file
        (tmp_path / hf.CONFIG).write_text("{}")
        safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / SINGLE, {"format": "pt"})
    elif foreign == "config.json only":
        (tmp_path / hf.CONFIG).write_text("{}")
    else:
        export(tmp_path)
        if foreign.endswith("/"):
            (tmp_path / foreign).mkdir()
        else:
            (tmp_path / foreign).write_text("mine")
    before = _contents(tmp_path)
    with pytest.raises(ModelError, match="holds what no export of ropewalk wrote"):
        export(tmp_path)
    assert _contents(tmp_path) == before


def test_a_file_or_link_is_no_place_for_an_export(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for name in ("file", "link"):
        with pytest.raises(ModelError, match="is not a directory"):
            export(tmp_path / name)


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files may hold 100 kB at most, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_earlier_export(tmp_path: Path, small_disk: None) -> None:
    export(tmp_path / "model", dtype="bfloat16", max_shard_bytes=50_000)
    before = _contents(tmp_path / "model")
    with pytest.raises(ModelError, match=r"cannot be written: .*; free some space"):
        export(tmp_path / "model")
    assert _contents(tmp_path / "model") == before
    assert os.listdir(tmp_path) == ["model"]


def test_an_overflow_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="overflow float16"):
        hf.write(tmp_path / "m", {}, tensors({"a": np.array([1e6], np.float32)}), dtype="float16")
    assert os.listdir(tmp_path) == []


def test_pickles_are_named_and_not_read(tmp_path: Path) -> None:
    (tmp_path / hf.CONFIG).write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelError, match=r"pickle \(pytorch_model.bin\).*never read.*safetensors"):
        hf.read(tmp_path)
    safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / SINGLE)
    assert hf.read(tmp_path).reader.shapes == {"a": (1,)}


@pytest.mark.parametrize("method", ["fp8", "awq"])
def test_quantized_weights_are_named(tmp_path: Path, method: str) -> None:
    config = {"quantization_config": {"quant_method": method}}
    (tmp_path / hf.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"'{method}', which is not supported"):
        hf.read(tmp_path)


def test_every_part_must_be_a_file_of_the_directory(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    export(tmp_path / "model", tokenizer=TOKENIZER, generation_config={})
    for name in (hf.CONFIG, hf.GENERATION_CONFIG, SINGLE, *TOKENIZER):
        path = tmp_path / "model" / name
        content = path.read_bytes()
        path.unlink()
        path.symlink_to(secret)
        with pytest.raises(UserError, match=f"{name}: leads to .*secret, outside"):
            hf.read(tmp_path / "model")
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(UserError, match=f"{name}: is a named pipe"):
            hf.read(tmp_path / "model")
        path.unlink()
        path.write_bytes(content)
    hf.read(tmp_path / "model")


def test_no_directory_or_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a directory"):
        hf.read(tmp_path / "gone")
    with pytest.raises(UserError, match=r"config.json: cannot be read: No such file"):
        hf.read(tmp_path)


def test_an_unknown_tokenizer_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"`../x` is not a tokenizer file"):
        export(tmp_path / "model", tokenizer={"../x": b""})
    assert os.listdir(tmp_path) == []
