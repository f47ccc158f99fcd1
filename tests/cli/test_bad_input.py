"""A mistake ends in one paragraph that names the file, the key, the numbers and the fix."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ropewalk.core.storage import owned
from ropewalk.text import bpe
from tests.cli.invoke import ropewalk
from tests.e2e.commands import write_recipe

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"


def refused(*arguments: str, says: tuple[str, ...]) -> None:
    """Exit code 2, nothing on stdout, and one paragraph with all of `says`."""
    code, out, err = ropewalk(*arguments)
    assert code == 2, (out, err)
    assert err.startswith("error: ")
    assert err.strip().count("\n") == 0, err
    assert "Traceback" not in err
    for part in says:
        assert part in err
    assert out == ""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sharded model directory with a tokenizer, to be spoilt."""
    directory = tmp_path / "model"
    shutil.copytree(GOLDENS / "llama-bfloat16", directory)
    bpe.train(iter(["the rope walk"]), 262).save(directory)
    return directory


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.learning_rat=1e-3", ("recipe.yml", "did you mean `optimizer.learning_rate`?")),
        ("optimiser.learning_rate=1e-3", ("unknown key `optimiser`", "did you mean `optimizer`?")),
        ("model.hidden_sise=64", ("`hidden_sise`", "did you mean `hidden_size`?")),
        ("zebra=1", ("unknown key `zebra`", "--print-config all")),
        ("steps=many", ("recipe.yml", "`steps`", "many")),
        ("steps=0", ("`steps` = 0", "greater than or equal to 1")),
        ("steps", ("`steps`", "key=value")),
        ("layout=sideways", ("`layout.rules`", "sideways", "fsdp_tensor")),
        ("model={family: lama}", ("`lama`", "did you mean `llama`?")),
        ("model={preset: llama-9}", ("`llama-9`", "presets: ")),
        ("model={}", ("preset", "family", "path")),
        ("model=llama-9", ("`llama-9`", "presets: ")),
        ("tokenizer={}", ("needs a tokenizer", "tokenizer=byte", "tokenizer.bpe=8192")),
        ("tokenizer={path: byte, bpe: 300}", ("tokenizer", "`path` or `bpe`")),
        ("tokenizer=none.json", ("none.json",)),
        ("data.sources=[]", ("`data.sources`", "at least 1")),
        ("data.sources=foo", ("`data.sources` = 'foo'", "'data.sources=[{path: foo}]'")),
        ("data.sources=[foo]", ("`data.sources.0` = 'foo'", "e.g. {path: foo}")),
        ("data.holdout={column: title}", ("`values` of a column or a `source`", "e.g. ")),
        ("data.holdout.column=nope", ("`nope` = `c`", "columns found: title, text, file")),
        ("optimizer=adamw", ("`optimizer` = 'adamw'", "'optimizer={kind: adamw}'")),
        ("data.sources=[{path: none.jsonl}]", ("none.jsonl", "No such file")),
        ("data.sources=[{path: 'none*.jsonl'}]", ("none*.jsonl", "no file matches")),
        ("data.sources=[{path: bundled:shakespear}]", ("did you mean `shakespeare`?",)),
        ("data.sources=[{path: .}]", ("directory",)),
        ("data.holdout.values=[tempst]", ("`title` = `tempst`",)),
        ("data.length=128", ("data.length = 128", "max_position_embeddings = 64")),
        ("model.vocab_size=200", ("token ids up to 271", "200", "272 or more")),
        ("accumulate=3", ("data.batch_size = 8", "accumulate = 3")),
        ("accumulate=2", ("data.batch_size = 8", "accumulate = 2", "8 devices", "multiple of 16")),
        ("data.batch_size=12", ("12", "8 devices", "multiple of 8")),
        ("layout.mesh={fsdp: 3}", ("fsdp 3", "needs 3 devices and 8", "layout.mesh")),
        ("layout.mesh={fsdp: -1, tensor: 3}", ("tensor 3", "8", "layout.mesh")),
        ("layout.mesh={rows: 8}", ("`rows`", "fsdp, context, tensor")),
        ("model.num_key_value_heads=3", ("num_attention_heads = 8", "num_key_value_heads = 3")),
        ("model.rope_scaling={rope_type: twisted}", ("twisted", "yarn")),
        ("precision=float8", ("`precision`", "float8", "bfloat16")),
        ("metrics.wandb=project", ("wandb", "pip install 'ropewalk[wandb]'")),
        ("model.path=nowhere", ("nowhere",)),
        ("directory=recipe.yml", ("recipe.yml is a file",)),
        ("directory=run*", ("run*", "`*`")),
    ],
)
def test_recipe(override: str, says: tuple[str, ...], recipe: Path) -> None:
    before = sorted(recipe.parent.rglob("*"))
    refused("train", str(recipe), override, says=says)
    assert set(before) <= set(recipe.parent.rglob("*"))


def test_recipe_file(recipe: Path, tmp_path: Path) -> None:
    refused("train", "tinny", says=("`tinny`", "did you mean `tiny`?"))
    refused("inspect", "none.yml", says=("none.yml",))
    (tmp_path / "broken.yml").write_text("steps: [1\nmodel: 2\n")
    refused("train", "broken.yml", says=("broken.yml", "line 2"))
    (tmp_path / "list.yml").write_text("- steps\n")
    refused("train", "list.yml", says=("list.yml", "mapping", "list"))
    (tmp_path / "part.yml").write_text(yaml.safe_dump({"steps": 3}))
    refused("train", "part.yml", says=("part.yml", "`model` is required", "`data` is required"))


def _with_data(recipe: Path, name: str) -> Path:
    values = yaml.safe_load(recipe.read_text())
    values["data"] = {"batch_size": 8, "length": 32, "sources": [{"path": name}]}
    recipe.write_text(yaml.safe_dump(values))
    return recipe


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", ("empty.txt", "empty (0 bytes)")),
        ("bad.jsonl", b'{"text": "one"}\n{"text": "two}\n', ("bad.jsonl:2",)),
        ("column.jsonl", b'{"body": "one", "id": 3}\n', ("column.jsonl:1", "`text`", "body, id")),
        ("latin.txt", b"caf\xe9 " * 99, ("latin.txt", "UTF-8")),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00junk", ("cut.jsonl.gz",)),
        ("cut.parquet", b"PAR1junk", ("cut.parquet",)),
        ("what.docx", b"junk", ("what.docx", ".jsonl")),
    ],
)
def test_data(name: str, content: bytes, says: tuple[str, ...], recipe: Path) -> None:
    (recipe.parent / name).write_bytes(content)
    refused("train", str(_with_data(recipe, name)), says=says)


def test_data_pipe(recipe: Path) -> None:
    os.mkfifo(recipe.parent / "pipe.txt")
    refused("train", str(_with_data(recipe, "pipe.txt")), says=("pipe.txt", "pipe"))
    refused("data", str(recipe), says=("pipe.txt", "pipe"))


def test_directory_that_is_no_run(recipe: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("years of work")
    refused("train", str(recipe), "directory=thesis", says=("thesis", "chapter.tex", "not a run"))
    assert [path.name for path in foreign.iterdir()] == ["chapter.tex"]
    refused("export", str(GOLDENS / "llama-tied"), "thesis", says=("thesis", "chapter.tex"))
    assert [path.name for path in foreign.iterdir()] == ["chapter.tex"]


def test_directory_in_use(recipe: Path, tmp_path: Path) -> None:
    with owned(tmp_path / "run"):
        refused("train", str(recipe), "directory=run", says=("run", "another process"))


def test_half_of_the_variables_of_several_processes(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    refused("train", str(recipe), says=("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID"))


def _change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _index(model: Path, target: str) -> None:
    index = model / "model.safetensors.index.json"
    mapped = json.loads(index.read_text())["weight_map"]
    _change(index, weight_map={**mapped, "model.norm.weight": target})


def _link(model: Path) -> None:
    shard = model / "model-00001-of-00004.safetensors"
    shard.rename(model.parent / "elsewhere")
    shard.symlink_to(model.parent / "elsewhere")


def _pipe(model: Path) -> None:
    shard = model / "model-00001-of-00004.safetensors"
    shard.unlink()
    os.mkfifo(shard)


def _long_header(model: Path) -> None:
    shard = model / "model-00001-of-00004.safetensors"
    shard.write_bytes(struct.pack("<Q", 10**6) + shard.read_bytes()[8:])


def _short(model: Path) -> None:
    shard = model / "model-00004-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m: _change(m / "config.json", model_type="gpt9"), ("gpt9", "llama", "qwen3")),
        (
            lambda m: _change(m / "config.json", rope_scaling={"rope_type": "twist", "factor": 2}),
            ("config.json", "twist"),
        ),
        (
            lambda m: _change(m / "config.json", dtype="float8"),
            ("config.json", "`float8`", "--dtype"),
        ),
        (lambda m: _change(m / "config.json", vocab_size=7), ("embed", "7")),
        (lambda m: _change(m / "config.json", num_hidden_layers=9), ("model.layers.",)),
        (lambda m: (m / "config.json").write_text("{"), ("config.json",)),
        (lambda m: (m / "config.json").unlink(), ("config.json",)),
        (lambda m: _index(m, "../elsewhere.safetensors"), ("../elsewhere.safetensors",)),
        (lambda m: _index(m, "/etc/passwd"), ("/etc/passwd",)),
        (_link, ("model-00001-of-00004.safetensors",)),
        (_pipe, ("model-00001-of-00004.safetensors",)),
        (_long_header, ("model-00001-of-00004.safetensors", "1000000")),
        (_short, ("model-00004-of-00004.safetensors",)),
    ],
)
def test_model_directory(
    spoil: Callable[[Path], object], says: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    spoil(model)
    refused("export", str(model), str(tmp_path / "out"), says=says)
    assert not (tmp_path / "out").exists()


def test_model_names(model: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    refused("export", "none.gguf", out, says=("none.gguf: does not exist", ".gguf file", "preset"))
    refused("import", "none.gguf", out, says=("none.gguf: does not exist",))
    for command in ("generate", "inspect", "chat"):
        refused(command, "smolm2-135m", says=("exist", "did you mean `smollm2-135m`?"))
    held = "holds no model: no checkpoint and no config.json; found: "
    for command in ("generate", "inspect"):
        refused(command, str(tmp_path), says=(str(tmp_path), held, "model"))
    refused("generate", str(model / "config.json"), says=("config.json: is no model",))
    refused("import", str(model), out, "--format", "maxtext", says=("maxtext", "gguf, hf"))
    refused("import", str(model), out, "--format", "gguf", says=("hf, not gguf",))
    refused("export", str(model), out, "--dtype", "int3", says=("int3", "float32"))
    (tmp_path / "text.gguf").write_text("no such thing")
    refused("import", str(tmp_path / "text.gguf"), out, says=("text.gguf",))
    assert not Path(out).exists()


def test_a_tokenizer_is_not_written_into_a_model(model: Path, tmp_path: Path) -> None:
    before = (model / "tokenizer.json").read_bytes()
    words = ("tokenizer", "train", "bundled:shakespeare", "--vocab-size", "300", "--output")
    refused(*words, str(model), says=("holds config.json", "new directory"))
    refused(*words, str(model / "config.json"), says=("is a file", "new directory"))
    assert (model / "tokenizer.json").read_bytes() == before


def test_writing(model: Path) -> None:
    refused("chat", str(model), says=(str(model), "chat template"))
    refused("generate", str(model), "--top-p", "2", "--prompt", "a", says=("`top_p` = 2.0",))
    (model / "tokenizer.json").unlink()
    refused("generate", str(model), "--prompt", "a", says=(str(model), "tokenizer"))


def test_prompt_longer_than_the_model_allows(model: Path) -> None:
    refused("generate", str(model), "--prompt", "rope " * 9999, says=("positions",))
    words = ("--prompt", "rope", "--max-new-tokens", "9999")
    refused("generate", str(model), *words, says=("9999", "positions"))


def test_debug_shows_the_traceback(recipe: Path) -> None:
    with pytest.raises(ValueError, match="unknown key `zebra`"):
        ropewalk("--debug", "train", str(recipe), "zebra=1")
