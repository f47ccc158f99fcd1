"""GGUF files written by the gguf package's writer, and blocks decoded by the letter of ggml's C."""

import dataclasses
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf as ggml
import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropewalk import models
from ropewalk.checkpoint import gguf, weights
from ropewalk.checkpoint.pretrained import Pretrained, load
from ropewalk.core.errors import ModelError, UserError
from ropewalk.layers.lm import table as lm_table
from tests.checkpoint.gguf_files import convert, interleaved
from tests.checkpoint.tiny import RULES, random, table
from tests.families.tiny import moved, tiny

Type = ggml.GGMLQuantizationType
D, N, K, H, F, V, LAYERS = 64, 4, 2, 16, 96, 32, 2
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.layers.": "blk.",
}  # fmt: skip


def converted(specs: Mapping, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors under the names and in the order of a GGUF file."""
    found = {}
    for tensor in weights.export(params, RULES, specs):
        name, value = tensor.name, tensor.value()
        if "q_proj" in name or "k_proj" in name:
            value = interleaved(value, N if "q_proj" in name else K)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        found[name] = value
    return found


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    kinds: Mapping[str, Type] | None = None,
    **metadata: Any,
) -> Path:
    """A file with the metadata of the tiny model; `a__b=1` changes its key `llama.a.b`."""
    values = {
        "block_count": LAYERS, "context_length": 512, "embedding_length": D,
        "feed_forward_length": F, "attention__head_count": N, "attention__head_count_kv": K,
        "attention__layer_norm_rms_epsilon": 1e-5, "rope__freq_base": 50000.0,
    }  # fmt: skip
    writer = ggml.GGUFWriter(path, "llama")
    for name, value in (values | metadata).items():
        key = f"llama.{name.replace('__', '.')}"
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_int64(key, value) if value < 0 else writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{i}" for i in range(V)])
    writer.add_token_merges(["t 1", "é t"])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name, Type.F32)
        if tensor.dtype == np.uint8:
            writer.add_tensor(name, tensor, raw_dtype=kind)
        else:
            writer.add_tensor(name, ggml.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sizes(**changes: Any) -> dict[str, Any]:
    return {"layers": LAYERS, "d": D, "n": N, "k": K, "h": H, "f": F, "v": V} | changes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    specs = table(**sizes())
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf", converted(specs, random(specs)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_a_file_gives_the_parameters_it_was_made_from(
    tmp_path: Path, tied: bool, biased: bool
) -> None:
    specs = table(**sizes(tied=tied, biased=biased))
    params = random(specs)
    file = gguf.read(write(tmp_path / "m.gguf", converted(specs, params)))
    loaded = weights.load_into(file.reader(RULES), RULES, specs)
    for path, array in loaded.items():
        np.testing.assert_array_equal(array, params[path], err_msg=path)
    assert file.architecture == "llama"
    assert file.config == {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "tie_word_embeddings": tied,
        "eos_token_id": 2,
    }


def test_a_bias_of_every_projection_is_the_config_s(tmp_path: Path) -> None:
    """Biases of queries, keys and values alone are a family's own."""
    specs = table(**sizes(biased=True))
    tensors = converted(specs, random(specs))
    tensors["blk.0.attn_output.bias"] = np.zeros(D, np.float32)
    assert gguf.read(write(tmp_path / "m.gguf", tensors)).config["attention_bias"] is True


# Family, what differs from the tiny config, what the file says beside the usual.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama, its heads' width unsaid": ("llama", {"hidden_size": 64}, {}),
    "qwen2": ("qwen2", {"sliding_window": None}, {}),
    "qwen3": ("qwen3", {"sliding_window": None}, {}),
    "gemma": ("gemma", {"tie_word_embeddings": True}, {}),
    "gemma2": ("gemma2", {"num_hidden_layers": 4, "tie_word_embeddings": True}, {}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 7}, {}),
    "gemma3, stretched": (
        "gemma3_text",
        {"num_hidden_layers": 6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0},
    ),
    "gemma3, every second layer": (
        "gemma3_text",
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        {"attention__sliding_window_pattern": 2},
    ),
    "gemma3, a flag a layer, another base": (
        "gemma3_text",
        {
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_local_base_freq": 500.0,
            "final_logit_softcapping": 20.0,
        },
        {
            "attention__sliding_window_pattern": [False, True, True],
            "rope__freq_base_swa": 500.0,
            "final_logit_softcapping": 20.0,
        },
    ),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_a_family_s_file_is_the_directory_that_it_was_made_from(tmp_path: Path, case: str) -> None:
    """As llama.cpp's converter makes it: config, weights, and logits over more than a window."""
    name, changes, said = FAMILIES[case]
    family, small = models.family(name), tiny(name).config
    if "query_pre_attn_scalar" in family.Config.model_fields:
        changes = {**changes, "query_pre_attn_scalar": small.head_dim}
    config = family.Config.parse({**small.model_dump(), **changes})
    start = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0)))
    specs = lm_table(start)
    zeros = {path: jax.numpy.zeros(spec.shape) for path, spec in specs.items()}
    Pretrained(family, config, moved(zeros, specs), None, "tiny").save(tmp_path / "hf")
    file = convert(tmp_path / "hf", tmp_path / "m.gguf", family.Config.gguf_architecture, **said)
    expected, found = load(tmp_path / "hf"), load(file)
    assert found.family is expected.family
    assert found.config == expected.config
    for path, array in expected.params.items():  # adding one to a norm's scale rounds it
        np.testing.assert_allclose(found.params[path], array, rtol=0, atol=2.4e-7, err_msg=path)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24))
    np.testing.assert_allclose(found.logits(tokens), expected.logits(tokens), atol=2e-4)


LEFT_OUT = "query_pre_attn_scalar"


@pytest.mark.parametrize(
    "name",
    [name for name, it in models.presets().items() if LEFT_OUT in type(it.config).model_fields],
)
def test_what_files_leave_out_follows_from_the_sizes(name: str) -> None:
    config = models.presets()[name].config
    values = {key: value for key, value in config.to_hf().items() if key != LEFT_OUT}
    assert type(config).from_gguf(values, name) == config


def test_a_file_without_a_window_has_none() -> None:
    """Files of gemma3 may say no window."""
    config = models.family("gemma3_text").Config
    values = tiny("gemma3_text").config.to_hf()
    del values["sliding_window"], values["layer_types"]
    assert set(config.from_gguf(values, "m.gguf").kinds()) == {"full_attention"}


def test_files_of_a_family_that_nobody_checked_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"m.gguf: GGUF files of `mistral` .* gemma3, llama, qwen2"
    ):
        models.from_gguf("mistral", "m.gguf")
    assert models.from_gguf("gemma3", "m.gguf") is models.family("gemma3_text")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention__sliding_window", 7), ("expert_count", 8), ("attention__scale", 0.5),
        ("attn_logit_softcapping", 50.0), ("attention__causal", 0), ("logit_scale", 2.0),
    ],
)  # fmt: skip
def test_a_key_that_is_not_understood_is_named(tmp_path: Path, key: str, value: Any) -> None:
    path = write(tmp_path / "m.gguf", _embedding(), block_count=1, **{key: value})
    file, fields = gguf.read(path), models.family("llama").Config.model_fields
    name = f"llama.{key.replace('__', '.')}"
    with pytest.raises(ModelError, match=f"metadata key `{name}` is {value}, which is not unders"):
        file.described(fields)


def test_harmless_keys_are_passed_over(tmp_path: Path) -> None:
    more: dict[str, Any] = {"vocab_size": 99, "expert_count": 0, "rope__scaling__finetuned": 0}
    file = gguf.read(write(tmp_path / "m.gguf", _embedding(), block_count=1, **more))
    assert file.described(()) == file.config


@pytest.mark.parametrize("value", [[True, False], "x", -1])
def test_a_pattern_of_windows_has_a_flag_a_layer(tmp_path: Path, value: Any) -> None:
    more = {"attention__sliding_window_pattern": value}
    file = gguf.read(write(tmp_path / "m.gguf", _embedding(), block_count=1, **more))
    with pytest.raises(ModelError, match=r"pattern` is .*, or a flag for each of the 1 layers"):
        file.described({"layer_types"})


def test_rows_stay_where_the_rule_names_no_pairs(model: Path) -> None:
    plain = [dataclasses.replace(rule, gguf="") for rule in RULES]
    name, file = "model.layers.1.self_attn.q_proj.weight", gguf.read(model)
    rows, raw = file.reader(RULES).read(name), file.reader(plain).read(name)
    np.testing.assert_array_equal(raw, file.dequantized("blk.1.attn_q.weight"))
    np.testing.assert_array_equal(raw, interleaved(rows, N))
    assert not np.array_equal(raw, rows)


def test_tokenizer_parts(model: Path) -> None:
    assert gguf.read(model).tokenizer == {
        "kind": "gpt2",
        "pre": "smollm",
        "tokens": [f"t{i}" for i in range(V)],
        "merges": ["t 1", "é t"],
        "eos_token_id": 2,
        "chat_template": "{{ messages }}",
    }


def half(block: bytes, at: int) -> np.float32:
    return np.float32(struct.unpack_from("<e", block, at)[0])


def q4_0(block: bytes) -> list[np.float32]:
    low = [byte & 15 for byte in block[2:]]
    high = [byte >> 4 for byte in block[2:]]
    return [half(block, 0) * np.float32(q - 8) for q in low + high]


def q4_1(block: bytes) -> list[np.float32]:
    low = [byte & 15 for byte in block[4:]]
    high = [byte >> 4 for byte in block[4:]]
    return [half(block, 0) * np.float32(q) + half(block, 2) for q in low + high]


def q8_0(block: bytes) -> list[np.float32]:
    return [half(block, 0) * np.float32(q) for q in struct.unpack_from("<32b", block, 2)]


def fifth_bit(bits: bytes, i: int) -> int:
    return (bits[i // 8] >> i % 8 & 1) << 4


def q5_0(block: bytes) -> list[np.float32]:
    low = [byte & 15 for byte in block[6:]] + [byte >> 4 for byte in block[6:]]
    whole = [q | fifth_bit(block[2:6], i) for i, q in enumerate(low)]
    return [half(block, 0) * np.float32(q - 16) for q in whole]


def q5_1(block: bytes) -> list[np.float32]:
    low = [byte & 15 for byte in block[8:]] + [byte >> 4 for byte in block[8:]]
    whole = [q | fifth_bit(block[4:8], i) for i, q in enumerate(low)]
    return [half(block, 0) * np.float32(q) + half(block, 2) for q in whole]


def scale_min(scales: bytes, j: int) -> tuple[int, int]:
    """get_scale_min_k4 of ggml-quants.c: 8 scales and 8 minima of 6 bits in 12 bytes."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    low = scales[j + 4] & 15 | (scales[j - 4] >> 6) << 4
    return low, scales[j + 4] >> 4 | (scales[j] >> 6) << 4


def q5_k(block: bytes) -> list[np.float32]:
    """dequantize_row_q5_K of ggml-quants.c: as Q4_K, the fifth bits of group j in bit j."""
    values = []
    for j in range(8):
        scale, minimum = map(np.float32, scale_min(block[4:16], j))
        for at in range(32):
            byte = block[48 + 32 * (j // 2) + at]
            q = (byte >> 4 if j % 2 else byte & 15) | (block[16 + at] >> j & 1) << 4
            values.append(half(block, 0) * scale * np.float32(q) - half(block, 2) * minimum)
    return values


def q4_k(block: bytes) -> list[np.float32]:
    """dequantize_row_q4_K of ggml-quants.c: 8 groups of 32, scales and minima in 6 bits."""
    quants = block[16:]
    values = []
    for j in range(8):
        scale, minimum = scale_min(block[4:16], j)
        bytes_ = quants[32 * (j // 2) : 32 * (j // 2) + 32]
        for byte in bytes_:
            q = byte >> 4 if j % 2 else byte & 15
            values.append(
                half(block, 0) * np.float32(scale) * np.float32(q)
                - half(block, 2) * np.float32(minimum)
            )
    return values


def q6_k(block: bytes) -> list[np.float32]:
    """dequantize_row_q6_K of ggml-quants.c: 2 halves of 128, each 4 rows of 32."""
    low, high = block[:128], block[128:192]
    scales = struct.unpack_from("<16b", block, 192)
    values = [np.float32(0)] * 256
    for side in range(2):
        for i in range(32):
            bits = high[32 * side + i]
            for row in range(4):
                byte = low[64 * side + i + 32 * (row % 2)]
                q = (byte >> 4 if row > 1 else byte & 15) | (bits >> 2 * row & 3) << 4
                scale = np.float32(scales[8 * side + i // 16 + 2 * row])
                value = half(block, 208) * scale * np.float32(q - 32)
                values[128 * side + 32 * row + i] = value
    return values


DECODERS = {
    Type.Q4_0: q4_0,
    Type.Q4_1: q4_1,
    Type.Q5_0: q5_0,
    Type.Q5_1: q5_1,
    Type.Q8_0: q8_0,
    Type.Q4_K: q4_k,
    Type.Q5_K: q5_k,
    Type.Q6_K: q6_k,
}
HALVES = {
    Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0],
    Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
}  # fmt: skip


@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.name)
def test_blocks_are_decoded_as_ggml_does(tmp_path: Path, kind: Type) -> None:
    """Any bytes, but for the scales, which are finite half floats."""
    numbers, width = ggml.GGML_QUANT_SIZES[kind]
    rows, blocks = 3, 2
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (rows, blocks, width), np.uint8)
    for at in HALVES[kind]:
        scales = generator.standard_normal((rows, blocks, 1)).astype(np.float16)
        data[..., at : at + 2] = scales.view(np.uint8)
    extra = {"x.weight": data.reshape(rows, -1)}
    path = write(tmp_path / "m.gguf", _embedding() | extra, {"x.weight": kind}, block_count=1)
    found = gguf.read(path).dequantized("x.weight")
    assert found.dtype == np.float32
    expected = [[DECODERS[kind](block.tobytes()) for block in row] for row in data]
    np.testing.assert_allclose(
        found, np.array(expected).reshape(rows, blocks * numbers), rtol=2e-7, atol=2e-6
    )


@pytest.mark.parametrize(
    ("kind", "bits"), [(Type.F32, 24), (Type.F16, 11), (Type.BF16, 8), (Type.Q8_0, 7)]
)
def test_plain_types_keep_their_bits(tmp_path: Path, kind: Type, bits: int) -> None:
    array = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    path = write(
        tmp_path / "m.gguf", _embedding() | {"x.weight": array}, {"x.weight": kind}, block_count=1
    )
    found = gguf.read(path).dequantized("x.weight")
    scale = np.abs(array).max() if kind is Type.Q8_0 else np.abs(array)
    assert found.dtype == np.float32
    assert np.all(np.abs(found - array) <= scale * 2.0**-bits * 1.02)


def test_unsupported_types_are_named(tmp_path: Path) -> None:
    kinds = {"x.weight": Type.TQ2_0}
    array = np.ones((2, 256), np.float32)
    path = write(tmp_path / "m.gguf", _embedding() | {"x.weight": array}, kinds, block_count=1)
    with pytest.raises(
        ModelError, match=r"`x.weight` has type TQ2_0.*supported are F32, F16, BF16"
    ):
        gguf.read(path).dequantized("x.weight")


def test_tensors_without_a_rule_are_unexpected(tmp_path: Path) -> None:
    specs = table(**sizes())
    tensors = converted(specs, random(specs)) | {"blk.0.ffn_gate_inp.weight": np.ones((2, 2), "f")}
    file = gguf.read(write(tmp_path / "m.gguf", tensors))
    with pytest.raises(ModelError, match=r"1 unexpected: blk.0.ffn_gate_inp.weight \[2, 2\]"):
        weights.load_into(file.reader(RULES), RULES, specs)


def frequencies(factor: float, theta: float = 50000.0) -> np.ndarray:
    """The loop in which llama.cpp's converter makes `rope_freqs.weight`."""
    found = []
    for i in range(0, H, 2):
        wave = 2 * np.pi * theta ** (i / H)
        if wave < 8192 / 4:
            found.append(1.0)
        elif wave > 8192 / 1:
            found.append(factor)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_rope_scaling_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    base = _embedding()
    assert "rope_scaling" not in gguf.read(write(path, base, block_count=1)).config
    banded = base | {gguf.ROPE_FREQS: frequencies(32.0)}
    assert gguf.read(write(path, banded, block_count=1)).config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    linear = write(
        path, base, block_count=1, rope__scaling__type="linear", rope__scaling__factor=4.0
    )
    assert gguf.read(linear).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    untyped = write(path, base, block_count=1, rope__scaling__factor=4.0)
    assert gguf.read(untyped).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    none = write(path, base, block_count=1, rope__scaling__type="none", rope__scaling__factor=4.0)
    assert "rope_scaling" not in gguf.read(none).config
    old = write(path, base, block_count=1, rope__scale_linear=2.0)
    assert gguf.read(old).config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    for strange in (frequencies(32.0) + 0.5, frequencies(np.inf), np.ones(3, np.float32)):
        write(path, base | {gguf.ROPE_FREQS: strange}, block_count=1)
        with pytest.raises(
            ModelError, match=r"`rope_freqs.weight` \[\d\] does not follow the rule"
        ):
            gguf.read(path)


METADATA = {
    "no head count": ({"attention__head_count": None}, "`llama.attention.head_count` is missing"),
    "no layers": ({"block_count": 0}, r"`llama.block_count` is 0, expected one count >= 1"),
    "more layers than tensors": ({"block_count": 2**32 - 1}, "4294967295 layers .* 1 tensors"),
    "text for a number": ({"embedding_length": "x"}, "`llama.embedding_length` is 'x'"),
    "no epsilon": ({"attention__layer_norm_rms_epsilon": 0.0}, "is 0.0, expected a number > 0"),
    "theta beyond float32": ({"rope__freq_base": float("inf")}, "is inf, expected a number > 0"),
    "theta not a number": ({"rope__freq_base": float("nan")}, "is nan, expected a number > 0"),
    "odd heads": ({"attention__key_length": 15}, "heads have size 15"),
    "partial rotary": ({"rope__dimension_count": 8}, "`llama.rope.dimension_count` is 8.* size 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", METADATA)
def test_metadata_must_describe_a_model(tmp_path: Path, case: str) -> None:
    changes, problem = METADATA[case]
    path = write(tmp_path / "m.gguf", _embedding(), **({"block_count": 1} | changes))
    with pytest.raises(ModelError, match=problem):
        gguf.read(path)


def test_a_file_must_be_whole_at_every_length(tmp_path: Path, model: Path) -> None:
    content = model.read_bytes()
    path = tmp_path / "cut.gguf"
    end = len(content) - 1
    for length in [0, 3, 4, 8, 16, 24, *range(30, 3000, 97), end // 2, end]:
        path.write_bytes(content[:length])
        with pytest.raises(ModelError, match=rf"cut.gguf: not a sound GGUF file of {length} bytes"):
            gguf.read(path)


def test_bad_magic_and_strange_files(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGML" + model.read_bytes()[4:])
    with pytest.raises(ModelError, match="GGUF magic invalid"):
        gguf.read(path)
    path.write_bytes(b"GGUF" + b"\0\0\0\3" + model.read_bytes()[8:])
    with pytest.raises(ModelError, match=r"not a sound GGUF file|big-endian"):
        gguf.read(path)
    with pytest.raises(UserError, match="is a directory"):
        gguf.read(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        gguf.read(tmp_path / "gone.gguf")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_bytes_read_or_are_refused(tmp_path: Path, model: Path, data: st.DataObject) -> None:
    content = bytearray(model.read_bytes()[:6000])
    content += bytes(model.stat().st_size - len(content))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 3000))
        content[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    try:
        gguf.read(path).reader(RULES)
    except ModelError:
        return


def test_an_array_longer_than_the_file_is_refused_at_once(tmp_path: Path) -> None:
    """The stock reader walks such an array without end."""
    key = b"a"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    field = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, 2**62)
    path = tmp_path / "m.gguf"
    path.write_bytes(header + field)
    with pytest.raises(ModelError, match="not a sound GGUF file"):
        gguf.read(path)


def test_a_part_of_a_split_model_says_how_to_join_it(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = ggml.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"one of 3 parts; join them with `llama-gguf-split"):
        gguf.read(path)


def _embedding() -> dict[str, np.ndarray]:
    return {"token_embd.weight": np.ones((V, D), np.float32)}
