"""What `ropewalk train` prints instead of training."""

import json
from pathlib import Path

import pytest
import yaml

from ropewalk.train.run import Run, read
from tests.cli.invoke import ropewalk
from tests.e2e.commands import write_recipe


def test_printed_config_is_the_run(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run = read(recipe, ["optimizer.learning_rate=1e-3"])
    for which in ("changes", "all"):
        words = ("train", str(recipe), "optimizer.learning_rate=1e-3", "--print-config", which)
        outcome = ropewalk(*words)
        assert outcome.code == 0
        assert Run.parse(yaml.safe_load(outcome.stdout), str(recipe)) == run
    assert not (tmp_path / "runs").exists()


def test_only_what_differs_is_printed(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    words = ("train", str(recipe), "seed=0", "accumulate=2", "--print-config", "changes")
    printed = yaml.safe_load(ropewalk(*words).stdout)
    assert printed["accumulate"] == 2
    assert printed["data"].keys() == {"sources", "holdout", "length", "batch_size"}
    assert not {"seed", "precision", "layout"} & printed.keys()


def test_schema_knows_every_key() -> None:
    schema = json.loads(ropewalk("train", "--print-schema").stdout)
    assert schema["properties"].keys() == Run.model_fields.keys()


def test_a_directory_in_place_of_a_recipe_is_told_what_to_do(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    outcome = ropewalk("train", str(tmp_path))
    assert outcome.code == 2
    assert str(tmp_path / "recipe.yml") in outcome.stderr
    assert "the command that began the run goes on with it" in outcome.stderr


def test_data_beside_the_recipe_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, elsewhere = write_recipe(tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    relative = "data.sources=[{path: data.jsonl}]"
    outcome = ropewalk("data", "../recipe.yml", relative, "tokenizer=byte", "--batches", "1")
    assert outcome.code == 0, outcome.stderr
    assert "../data.jsonl" in outcome.stdout
    outcome = ropewalk("train", str(recipe), "data.sources=[{path: none.jsonl}]")
    assert outcome.code == 2
    assert f"(seen from {elsewhere} and from {tmp_path})" in outcome.stderr


def test_usage() -> None:
    for words in (("train",), ("train", "tiny", "--print-config", "some"), ("trian",)):
        outcome = ropewalk(*words)
        assert outcome.code == 2
        assert "Traceback" not in outcome.stderr
