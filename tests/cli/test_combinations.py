"""Keys that contradict each other, or that nothing would come of, are refused; and none is lost."""

from pathlib import Path

import pytest

from ropewalk.train.run import read
from tests.cli.invoke import ropewalk
from tests.e2e.commands import write_recipe

CASES = [
    (("model.preset=qwen3-0.6b",), ("qwen3", "llama")),
    (("data.holdout=null",), ("evaluate.every", "data.holdout")),
    (("checkpoint.best_metric=eval_los",), ("eval_los", "eval_loss")),
    (("samples.max_new_tokens=64",), ("samples.max_new_tokens", "64")),
    (("optimizer.learning_rate=.inf",), ("optimizer.learning_rate",)),
]


@pytest.mark.parametrize(("overrides", "told"), CASES)
def test_refused_in_one_paragraph(overrides, told, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    outcome = ropewalk("train", str(recipe), f"directory={tmp_path / 'run'}", *overrides)
    assert outcome.code == 2
    for word in told:
        assert word in outcome.stderr
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_rules_and_mesh_are_both_kept(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    layout = read(recipe, ["layout=fsdp_tensor", "layout.mesh={fsdp: -1, tensor: 2}"]).layout
    assert (layout.rules, layout.mesh) == ("fsdp_tensor", {"fsdp": -1, "tensor": 2})
