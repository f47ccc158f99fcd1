"""Families are found by their file; presets have the sizes of the published models."""

import math

import jax
import pytest
from flax import nnx

from ropewalk import models
from ropewalk.core.errors import ConfigError, ModelError
from ropewalk.layers.lm import table

# Parameters of the published checkpoints, as their safetensors count them; a tied head counts once.
# Of those that see images, the text model's.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
}
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip


def test_every_preset_has_a_published_size_here():
    assert set(models.presets()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_as_many_parameters_as_the_published_model(name):
    family, config = models.presets()[name]
    model = jax.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0)))  # no memory
    assert sum(math.prod(spec.shape) for spec in table(model).values()) == PUBLISHED[name]


def test_a_family_is_one_file():
    assert {"llama", "qwen3"} <= set(models.families())
    for name in models.families():
        module = models.family(name)
        assert module.Config.family() == name
        assert module.__doc__ and module.WEIGHTS and module.PRESETS
        assert all(isinstance(config, module.Config) for config in module.PRESETS.values())


def test_preset_names_belong_to_one_family_each():
    counts = [len(models.family(name).PRESETS) for name in models.families()]
    assert len(models.presets()) == sum(counts)


def test_a_recipe_names_a_preset_and_changes_it():
    family, config = models.from_recipe({"preset": "llama3.2-1b", "num_hidden_layers": 2})
    assert family is models.family("llama")
    base = models.presets()["llama3.2-1b"].config
    assert config == base.model_copy(update={"num_hidden_layers": 2})


def test_a_recipe_names_a_family_and_its_sizes():
    family, config = models.from_recipe({"family": "llama", **SIZES})
    assert family is models.family("llama")
    assert (config.num_key_value_heads, config.head_dim) == (2, 8)


def test_a_resolved_config_is_a_recipe():
    config = models.presets()["llama3.1-8b"].config
    again = models.from_recipe({"family": config.family(), **config.model_dump(mode="json")})
    assert again.config == config


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({}, ConfigError, ["preset", "family", "path"]),
        ({"preset": "llama3-8"}, ConfigError, ["llama3-8", "did you mean `llama3-8b`"]),
        ({"family": "quen3"}, ModelError, ["quen3", "did you mean `qwen3`", "llama"]),
        (
            {"family": "llama", **SIZES, "hiden_size": 4},
            ConfigError,
            ["did you mean `hidden_size`"],
        ),
        ({"family": "llama"}, ConfigError, ["vocab_size", "required"]),
        ({"preset": "qwen3-8b", "head_dim": 0}, ConfigError, ["model", "head_dim", "0"]),
    ],
)
def test_a_mistake_in_a_recipe_is_named(values, error, words):
    with pytest.raises(error) as refusal:
        models.from_recipe(values)
    assert all(word in str(refusal.value) for word in words), refusal.value
