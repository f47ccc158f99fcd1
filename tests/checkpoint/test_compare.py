"""Two models are the same only when every tensor is."""

import dataclasses
from pathlib import Path

import pytest

from ropewalk.checkpoint.compare import compare
from ropewalk.checkpoint.pretrained import load
from tests.checkpoint.saved import saved

PARITY = Path(__file__).parents[1] / "parity" / "goldens"


def test_a_copy_is_the_same(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole")
    load(whole).save(tmp_path / "copy")
    result = compare(whole, tmp_path / "copy")
    assert result.same(0.0)
    assert result.tensors == {}


def test_one_number_that_no_prompt_reaches_is_seen(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole")
    model = load(whole)
    embedding = model.params["embed.weight"].at[model.config.vocab_size - 1, 0].add(0.5)
    other = dataclasses.replace(model, params={**model.params, "embed.weight": embedding})
    other.save(tmp_path / "other")
    result = compare(whole, tmp_path / "other")
    assert not result.same(1e-4)
    assert result.tensors == {"embed.weight": pytest.approx(0.5, abs=1e-6)}


def test_models_of_unlike_sizes_are_not_said_to_differ_by_a_number(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole")
    result = compare(whole, PARITY / "llama-tied")
    assert not result.same(float("inf"))
    assert "logits: not compared, the models are too different" in result.lines()
    assert result.summary()["logits"] is None
