"""Reading and writing Hugging Face's `config.json`, and what is refused."""

import json
import re

import pytest

from ropewalk import models
from ropewalk.core.errors import ConfigError, ModelError

OLDER = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 48, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": None, "torch_dtype": "bfloat16", "tie_word_embeddings": True,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}  # fmt: skip


def read(changes=None, without=()):
    values = {
        key: value for key, value in {**OLDER, **(changes or {})}.items() if key not in without
    }
    return models.from_hf(values, "the/config.json").config


def newer(parameters, **changes):
    values = {"rope_parameters": parameters, "dtype": "bfloat16", **changes}
    return read(values, without=("rope_theta", "rope_scaling", "torch_dtype"))


@pytest.mark.parametrize(
    "scaling",
    [None, LLAMA3, {"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 2.0}],
)
def test_both_spellings_give_one_config(scaling):
    older = read({"rope_scaling": scaling})
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": 500000.0}
    assert newer(parameters) == older
    assert newer(parameters, layer_types=["full_attention"] * 2) == older
    assert older.rope_theta == 500000.0


def test_the_oldest_spelling_says_type():
    assert read({"rope_scaling": {"type": "linear", "factor": 4.0}}) == read(
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    )


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_what_is_written_is_read_back(scaling):
    config = read({"rope_scaling": scaling})
    written = json.loads(json.dumps(config.to_hf()))
    assert written["model_type"] == "llama"
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["rope_scaling"] == scaling
    assert models.from_hf(written, "config.json").config == config


def test_missing_sizes_follow_from_the_others():
    config = read(without=("num_key_value_heads",))
    assert (config.num_key_value_heads, config.head_dim) == (6, 8)
    assert read({"num_key_value_heads": None, "head_dim": None}) == config
    assert read({"head_dim": 16}).head_dim == 16


def test_a_missing_theta_is_the_families_default():
    config = read(without=("rope_theta",))
    assert config.rope_theta == type(config).model_fields["rope_theta"].default


def test_keys_that_cannot_matter_are_ignored():
    more = {
        "use_cache": True,
        "bos_token_id": 1,
        "transformers_version": "4.1",
        "pretraining_tp": 1,
    }
    assert read(more) == read()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "50.0", "the/config.json"]),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, ["`su`", "llama3, yarn, longrope"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding_attention"]),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"model_type": "lama"}, ["lama", "did you mean `llama`", "qwen3"]),
        ({"model_type": None}, ["model_type", "the/config.json"]),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes, words):
    with pytest.raises(ModelError) as refusal:
        read(changes)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 4}, ["num_attention_heads = 6", "num_key_value_heads = 4"]),
        ({"num_attention_heads": 10}, ["hidden_size = 48", "num_attention_heads = 10", "head_dim"]),
        ({"head_dim": 7}, ["head_dim", "7", "multiple of 2"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
        ({"hidden_size": "wide"}, ["hidden_size", "wide"]),
        ({"hidden_act": "gelu"}, ["gelu", "silu"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling", "factor", "required"]),
        ({"rope_scaling": {**LLAMA3, "facto": 2}}, ["rope_scaling", "facto"]),
    ],
)
def test_values_that_do_not_fit_are_refused_with_their_numbers(changes, words):
    with pytest.raises(ConfigError) as refusal:
        read(changes)
    assert all(word in str(refusal.value) for word in ["the/config.json", *words]), refusal.value


@pytest.mark.parametrize(
    ("changes", "blamed"),
    [
        ({"hidden_size": -64}, {"hidden_size"}),
        ({"hidden_size": "wide"}, {"hidden_size"}),
        ({"hidden_size": None}, {"hidden_size"}),
        ({"num_attention_heads": -6, "num_key_value_heads": None}, {"num_attention_heads"}),
        ({"hidden_size": 0, "num_attention_heads": 0}, {"hidden_size", "num_attention_heads"}),
    ],
)
def test_only_the_value_that_is_wrong_is_blamed(changes, blamed):
    with pytest.raises(ConfigError) as refusal:
        read(changes)
    assert set(re.findall("key `(.*?)`", str(refusal.value))) == blamed, refusal.value


def test_a_share_follows_from_sizes_however_they_are_written():
    assert read({"hidden_size": "96", "num_attention_heads": "6"}).head_dim == 16


def test_a_missing_size_is_named():
    with pytest.raises(ConfigError, match=r"key `intermediate_size` is required"):
        read(without=("intermediate_size",))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_parameters": "x"}, "`rope_parameters` = 'x' must be a mapping or null"),
        ({"rope_scaling": "yarn"}, "`rope_scaling` = 'yarn' must be a mapping or null"),
        ({"rope_parameters": {"rope_theta": 77.0}}, "`rope_theta` = 500000.0 and .* say 77.0"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.25},
            "`partial_rotary_factor` = 0.25 and .* say 0.5",
        ),
        (
            {"rope_scaling": {"factor": 4.0}},
            "rope_scaling has factor = 4.0 and no rope_type; say which of linear",
        ),
    ],
)
def test_what_is_said_twice_or_by_halves_about_rope_is_refused(changes, says):
    with pytest.raises(ModelError, match=rf"the/config.json: {says}"):
        read(changes)


@pytest.mark.parametrize("local", [{}, {"sliding_attention": None}])
def test_a_second_rope_that_is_not_said_is_the_usual_one(local):
    values = models.presets()["gemma3-270m"].config.to_hf()
    del values["rope_local_base_freq"], values["rope_theta"], values["rope_scaling"]
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    values["rope_parameters"] = {"full_attention": full, **local}
    config = models.from_hf(values, "config.json").config
    assert (config.rope_theta, config.rope_local_base_freq) == (1e6, 1e4)
