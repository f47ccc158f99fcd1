"""Families are found by their file; presets have the sizes of the published models."""

import math

import jax
import pytest
from flax import nnx

from ropewalk import models
from ropewalk.checkpoint.pretrained import abstract
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
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_419_200,
    "kimi-k2": 1_026_408_232_448,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "llama4-scout": 107_769_861_120,
    "llama4-maverick": 400_711_848_960,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "olmo3-7b": 7_298_011_136,
    "olmo3-32b": 32_233_522_176,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-coder-480b-a35b": 480_154_875_392,
    "qwen3-next-80b-a3b": 79_674_391_296,
    # No checkpoint of these was published: the paper's sizes, counted by hand. Two tables, and a
    # layer of d features has 12 d^2 weights, 13 d biases and scales.
    **{
        name: (vocab + 2048) * d + layers * (12 * d**2 + 13 * d) + 2 * d
        for name, vocab, d, layers in (
            ("gpt3-52k", 1024, 16, 1),
            ("gpt3-6.7b", 50257, 4096, 32),
            ("gpt3-13b", 50257, 5120, 40),
            ("gpt3-175b", 50257, 12288, 96),
        )
    },
}
# Billions of parameters that work on a token, as their authors say; gpt-oss's without its table.
ACTIVE = {
    "mixtral-8x7b": 12.9, "mixtral-8x22b": 39.1, "deepseek-v2": 21.4, "deepseek-v3": 37.6,
    "kimi-k2": 32.9, "qwen3-30b-a3b": 3.35, "qwen3-235b-a22b": 22.2, "llama4-scout": 17.2,
    "llama4-maverick": 17.2, "gpt-oss-20b": 3.61, "gpt-oss-120b": 5.13,
    "qwen3-coder-480b-a35b": 35.5, "qwen3-next-80b-a3b": 3.87,
}  # fmt: skip
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVE)
def test_the_parameters_that_work_on_a_token_are_as_published(name):
    module, config = models.presets()[name]
    found = abstract(module, config).active()
    if config.family() == "gpt_oss":
        found -= config.vocab_size * config.hidden_size
    assert found / 1e9 == pytest.approx(ACTIVE[name], rel=5e-3)


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
