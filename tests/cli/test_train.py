"""What `ropewalk train` prints instead of training."""

import json
from pathlib import Path

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
        assert Run.parse(yaml.safe_load(outcome.stdout)) == run
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


def test_usage() -> None:
    for words in (("train",), ("train", "tiny", "--print-config", "some"), ("trian",)):
        outcome = ropewalk(*words)
        assert outcome.code == 2
        assert "Traceback" not in outcome.stderr
