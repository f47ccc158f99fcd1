"""One door for models: what is refused at it, and what is asked of a model that came through."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import ropewalk
from ropewalk import models
from ropewalk.checkpoint.pretrained import Pretrained
from ropewalk.core.errors import ModelError, UserError
from ropewalk.layers.decode import Sampling
from ropewalk.parallel import mesh
from ropewalk.parallel.axes import Placement, shardings
from ropewalk.parallel.rules import RULES
from tests.families.tiny import SIZES, tiny


@functools.cache
def model() -> Pretrained:
    it = tiny("llama")
    return Pretrained(models.family("llama"), it.config, it.params, None, "tiny")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing/here", "nothing/here: does not exist, and no preset has that name; give a Hug"),
        ("smolm2-135m", "smolm2-135m: does not exist.*did you mean `smollm2-135m`"),
        ("run", "run: holds no model: no checkpoint and no config.json; found: checkpoints, rec"),
        (".", r"\.: holds no model: no checkpoint and no config.json; found: run$"),
        ("run/recipe.yml", "recipe.yml: is no model; give a Hugging Face directory"),
        (5, "named by a text or a path, not by 5"),
        (None, "named by a text or a path"),
        (b"run", "named by a text or a path"),
    ],
)
def test_what_is_no_model_says_what_it_is(
    name: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yml").write_text("steps: 3\n")
    with pytest.raises(ModelError, match=says):
        ropewalk.load(name)


IDS = [[3, 1, 4], [1, 5, 9]]


def test_ids_come_in_any_kind_of_array() -> None:
    kinds: list[Callable[[list[list[int]]], Any]] = [
        list,
        tuple,
        np.array,
        lambda rows: [np.array(row, np.uint8) for row in rows],
    ]
    written = [model().generate(kind(IDS), max_new_tokens=3) for kind in kinds]
    assert all(one == written[0] for one in written)


@pytest.mark.parametrize(
    "prompts",
    [
        [[1.0, 2.5]], np.ones((1, 2)), [b"abc"], b"abc", [None], None, 5, [1, 2], {"a": 1},
        [[True]], [[1, "a"]], [[[1]]], [[1], [1, [2]]], [{}],
    ],
)  # fmt: skip
def test_prompts_that_are_no_texts_and_no_ids_are_refused(prompts: Any) -> None:
    with pytest.raises(ModelError, match=r"prompts? .*(give a text, or a list of ids|not )"):
        model().generate(prompts, max_new_tokens=1)


@pytest.mark.parametrize("tokens", [[1, 2], [[1], [2, 3]], "abc", [[1.5]], [[True]], None, [[]]])
def test_logits_of_what_are_no_tokens_are_refused(tokens: Any) -> None:
    with pytest.raises(ModelError, match="whole numbers"):
        model().logits(tokens)


def test_the_default_length_is_what_the_positions_leave() -> None:
    prompt = [7] * (SIZES["max_position_embeddings"] - 5)
    (written,) = model().generate([prompt])
    assert len(written.tokens) == 5
    with pytest.raises(ModelError, match="6 new ones"):
        model().generate([prompt], max_new_tokens=6)


def test_a_stream_is_refused_before_its_first_piece() -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        model().stream([1], Sampling())


@pytest.mark.parametrize("directory", [5, None, b"x"])
def test_a_place_to_save_is_named(directory: Any) -> None:
    with pytest.raises(UserError, match="named by a text or a path"):
        model().save(directory)


def test_what_no_optimizer_touches_stays_as_exact_as_it_was(tmp_path: Path) -> None:
    """A bias that moves the choice of experts: in bfloat16 it would choose others."""
    golden = Path(__file__).parents[1] / "parity" / "goldens" / "deepseek_v3-groups"
    exact, narrow = (ropewalk.load(golden, dtype=kind) for kind in ("float32", "bfloat16"))
    biases = [path for path in exact.params if path.endswith("selection_bias")]
    assert biases
    narrow.save(tmp_path / "out")
    back = ropewalk.load(tmp_path / "out")
    assert str(back.params["embed.weight"].dtype) == "bfloat16"
    for path in biases:
        for found in (narrow, back):
            np.testing.assert_array_equal(found.params[path], exact.params[path])


def test_weights_are_read_to_where_they_lie(tmp_path: Path) -> None:
    """Spread over eight devices by a table of rules, with the values of one."""
    devices, rules = jax.devices(), "fsdp_tensor"
    sizes = mesh.default_sizes(rules, len(devices))
    placement = Placement(mesh.build(sizes, devices), RULES[rules])
    model().save(tmp_path / "model")
    one = ropewalk.load(tmp_path / "model")
    spread = ropewalk.load(tmp_path / "model", placement=placement)
    for path, place in shardings(tiny("llama").table, placement).items():
        assert spread.params[path].sharding == place
        np.testing.assert_array_equal(spread.params[path], one.params[path], err_msg=path)
    assert not spread.params["embed.weight"].sharding.is_fully_replicated
