"""What every family gets for nothing. No test here knows a family; a new file in `models` is found.

Float32 tolerances are a few units of rounding of values near 1 to 10; what is looser says why.
"""

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ropewalk import models
from ropewalk.checkpoint import hf, weights
from ropewalk.core.errors import ConfigError, UserError
from ropewalk.core.paths import flatten
from ropewalk.core.weights import expand
from ropewalk.layers import dispatch
from ropewalk.layers.decode import Decoder, Sampling
from ropewalk.layers.lm import parameters, with_parameters
from ropewalk.layers.moe import MoE
from ropewalk.parallel import mesh
from ropewalk.parallel.axes import (
    PARAMETER_AXES,
    Placement,
    batch_sharding,
    placed,
    shardings,
)
from ropewalk.parallel.rules import RULES
from tests.families.tiny import (
    BATCH,
    CASES,
    LENGTH,
    PROMPT,
    SIZES,
    batch,
    cached,
    counted,
    forward,
    gradient,
    gradient_at,
    gradient_rounding,
    has_experts,
    rounding,
    smooth,
    tiny,
    tokens,
)

# A head of its own, which `options` ties, is any family's: one has it here.
GRADIENTS = [
    *((name, v) for name in models.families() for v in dict.fromkeys(("options", smooth(name)))),
    (next(name for name in models.families() if not has_experts(name)), "plain"),
]
case = pytest.mark.parametrize(("name", "variant"), CASES)
family = pytest.mark.parametrize("name", models.families())


def close(found, wanted, name, variant="plain"):
    """Equal but for rounding; of a model that magnifies it, as much as one rounding does."""
    atol = max(2e-5, 2 * rounding(name, variant))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("name", "variant"), GRADIENTS)
def test_gradients_are_finite_and_reach_every_parameter(name, variant):
    loss, grads = gradient(name, variant)
    assert np.isfinite(loss)
    for path, grad in grads.items():
        assert np.all(np.isfinite(grad)), path
        # What is not trained (a bias that moves the choice of experts) has no gradient.
        trained = tiny(name, variant).table[path].trained
        assert np.any(grad != 0) == trained, f"{path} has no influence"


@family
def test_gradients_agree_with_differences(name):
    variant = smooth(name)
    _, grads = gradient(name, variant)
    it = tiny(name, variant)
    norm = float(jnp.sqrt(sum(jnp.sum(g * g) for g in grads.values())))
    step = 3e-4 / norm  # a model may curve
    ends = []
    for s in (step, -step):
        there = {path: it.params[path] + s * g for path, g in grads.items()}
        ends.append(float(gradient_at(there, name, variant)[0]))
    # Differences of two float32 losses near 10 that lie some 0.01 apart.
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(norm**2, rel=1e-2)


@case
def test_prefill_and_decode_equal_the_full_forward(name, variant):
    it, prompt = tiny(name, variant), PROMPT
    ids = tokens()
    positions, segments = counted()
    full = forward(name, variant)(ids, positions, segments)
    run, cache = cached(name, variant)
    logits, cache = run(it.params, cache, *(a[:, :prompt] for a in (ids, positions, segments)))
    stepwise = [logits]
    for t in range(prompt, LENGTH):
        logits, cache = run(
            it.params, cache, *(a[:, t : t + 1] for a in (ids, positions, segments))
        )
        stepwise.append(logits)
    close(np.concatenate(stepwise, axis=1), full, name, variant)


@family
def test_greedy_tokens_equal_those_of_full_forwards(name):
    it, new = tiny(name), 8
    prompts = [tokens(row, (length,)).tolist() for row, length in enumerate((3, 16, 7, 11))]
    written = list(Decoder(it.model()).stream(prompts, Sampling(max_new_tokens=new)))
    rows = [list(prompt) for prompt in prompts]
    scores = [[] for _ in prompts]
    positions, _ = counted()
    for _ in range(new):  # without cache: everything again for every token
        ids, segments = np.zeros((2, BATCH, LENGTH), np.int32)
        for row, prompt in enumerate(rows):
            ids[row, : len(prompt)] = prompt
            segments[row, : len(prompt)] = 1
        logits = jax.nn.log_softmax(forward(name, "plain")(ids, positions, segments))
        for row, prompt in enumerate(rows):
            last = logits[row, len(prompt) - 1]
            prompt.append(int(np.argmax(last)))
            scores[row].append(float(np.max(last)))
    for row, prompt in enumerate(prompts):
        mine = [emitted for emitted in written if emitted.row == row]
        assert [emitted.token for emitted in mine] == rows[row][len(prompt) :]
        close([emitted.logprob for emitted in mine], scores[row], name)


@case
def test_a_packed_row_equals_its_sequences_apart(name, variant):
    ids, lengths = tokens(4), (7, 9, 8)
    starts = np.cumsum((0, *lengths))
    positions = np.concatenate([np.arange(n) for n in lengths])
    segments = np.repeat((1, 2, 3), lengths)
    shape = (BATCH, 1)
    packed = forward(name, variant)(ids, np.tile(positions, shape), np.tile(segments, shape))
    for first, length in zip(starts[:-1], lengths, strict=True):
        alone, apart = np.zeros((2, BATCH, LENGTH), np.int32)
        alone[:, :length] = ids[:, first : first + length]
        apart[:, :length] = 1
        logits = forward(name, variant)(alone, counted()[0], apart)
        close(packed[:, first : first + length], logits[:, :length], name, variant)


@case
def test_padding_on_either_side_changes_nothing(name, variant):
    length = 15
    ids, (positions, segments) = tokens(5), counted()
    bare = forward(name, variant)(ids, positions, segments)[:, :length]
    for first in (0, LENGTH - length):
        padded, place, real = np.zeros((3, BATCH, LENGTH), np.int32)
        padded[:] = tokens(6)  # what stands in the padding must not matter
        span = slice(first, first + length)
        padded[:, span], place[:, span], real[:, span] = ids[:, :length], np.arange(length), 1
        logits = forward(name, variant)(padded, place, real)
        close(logits[:, span], bare, name, variant)
        assert np.all(np.isfinite(logits))


@family
def test_left_padding_is_not_stored_in_a_cache(name):
    it, pad = tiny(name), 3
    length = PROMPT - pad
    ids, (positions, segments) = tokens(7), counted()
    full = forward(name, "plain")(ids, positions, segments)
    run, cache = cached(name, "plain")
    shape = (BATCH, PROMPT)
    padded, place, real = np.zeros((3, *shape), np.int32)
    padded[:, pad:], place[:, pad:], real[:, pad:] = ids[:, :length], np.arange(length), 1
    logits, cache = run(it.params, cache, padded, place, real)
    close(logits[:, pad:], full[:, :length], name)
    step = slice(length, length + 1)
    logits, _ = run(it.params, cache, ids[:, step], positions[:, step], segments[:, step])
    close(logits, full[:, step], name)


@family
def test_unroll_equals_scan(name):
    it, inputs = tiny(name, "options"), (tokens(), *counted())
    other = it.running("unroll", "none")
    logits = jax.jit(lambda params, *inputs: other.model(params)(*inputs)[0])(it.params, *inputs)
    close(logits, forward(name, "options")(*inputs), name, "options")


# Remat is the stack's, whatever its blocks (tests/layers/test_stack.py): each way of it for one
# family, attention and recurrences, dense and with experts.
REMAT = [(run, remat) for remat in ("full", "dots", "dots_no_batch") for run in ("scan", "unroll")]


@pytest.mark.parametrize(("name", "way"), list(zip([*models.families()][::-3], REMAT, strict=True)))
def test_remat_changes_no_gradient(name, way):
    _same_gradient(name, gradient(name, "options", *way))


# Between them these cut every dimension that any table cuts; of the others one a family. Without
# experts, fsdp_expert cuts nothing that fsdp_tensor does not.
GRADIENT_RULES = ("fsdp_tensor", "fsdp_expert")
CUTS = [
    (name, rules)
    for rules in GRADIENT_RULES
    for name in models.families()
    if rules != "fsdp_expert" or has_experts(name)
]


@pytest.mark.parametrize(
    ("name", "rules"),
    list(
        zip(
            models.families(),
            itertools.cycle(rules for rules in RULES if rules not in GRADIENT_RULES),
            strict=False,
        )
    ),
)
def test_eight_devices_have_the_loss_of_one(name, rules):
    loss, _ = gradient(name, "options")
    found = _on_eight(name, rules, lambda loss: loss)
    np.testing.assert_allclose(found, loss, rtol=1e-6, atol=rounding(name, "options"))


@pytest.mark.parametrize(("name", "rules"), CUTS)
def test_eight_devices_have_the_gradient_of_one(name, rules):
    _same_gradient(name, _on_eight(name, rules, jax.value_and_grad))


def _on_eight(name, rules, way):
    """The loss of `batch()`, or what `way` makes of it, on a mesh under a table of rules."""
    it, devices = tiny(name, "options"), jax.devices()
    placement = Placement(
        mesh.build(mesh.default_sizes(rules, len(devices)), devices), RULES[rules]
    )
    where = shardings(it.table, placement)
    assert not all(place.is_fully_replicated for place in where.values())

    def loss(params, batch):
        with placed(placement):
            return it.loss(params, batch)

    rows = jax.device_put(batch(), batch_sharding(placement, len(batch()["tokens"])))
    return jax.jit(way(loss))(jax.device_put(it.params, where), rows)


def _same_gradient(name, found):
    loss, grads = gradient(name, "options")
    np.testing.assert_allclose(found[0], loss, rtol=1e-6, atol=rounding(name, "options"))
    for path, grad in grads.items():
        atol = max(1e-6, 2 * gradient_rounding(name, "options")[path])
        np.testing.assert_allclose(found[1][path], grad, rtol=1e-4, atol=atol, err_msg=path)


@case
def test_weights_cover_every_parameter_and_come_back(name, variant, tmp_path):
    it = tiny(name, variant)
    tensors = weights.export(it.params, it.family.WEIGHTS, it.table)
    assert len(tensors) == len({tensor.name for tensor in tensors})
    assert sum(np.prod(tensor.shape) for tensor in tensors) == sum(
        p.size for p in it.params.values()
    )
    hf.write(tmp_path / "model", it.config.to_hf(), tensors)
    found = hf.read(tmp_path / "model")
    assert models.from_hf(found.config, "config.json") == (it.family, it.config)
    back = weights.load_into(found.reader, it.family.WEIGHTS, it.table)
    for path, value in it.params.items():
        np.testing.assert_array_equal(back[path], value, err_msg=path)


@case
def test_every_layer_of_the_stack_is_numbered_in_order(name, variant):
    it = tiny(name, variant)
    entries = expand(it.family.WEIGHTS, it.table)
    for entry in entries:
        layer = re.search(r"\.layers\.(\d+)\.", entry.source)
        if layer is None:
            continue
        inner = entry.path.split(".", 4)[4]
        mine = flatten(it.model().layers.layer(int(layer[1])))[inner]
        expert = entry.index[1:]
        np.testing.assert_array_equal(mine[expert], it.params[entry.path][entry.index])


@case
def test_every_parameter_has_known_axes(name, variant):
    for path, spec in tiny(name, variant).table.items():
        assert set(spec.axes) <= set(PARAMETER_AXES), path
        assert len(spec.axes) == len(spec.shape) == len(set(spec.axes)), path


@family
def test_bfloat16_stays_near_float32(name):
    variant, ids = smooth(name, "plain"), tokens(8)
    it = tiny(name, variant)
    exact = forward(name, variant)(ids, *counted())
    narrow = {path: value.astype(jnp.bfloat16) for path, value in it.params.items()}
    logits = jax.jit(lambda params: it.model(params)(ids)[0])(narrow)
    assert logits.dtype == jnp.float32
    # 8 bits a number (2^-9 = 0.2 %), and an error of its own from each of some twenty products; of
    # a model that magnifies it, as much as the rounding of the weights alone does.
    rounded = {path: value.astype(jnp.float32) for path, value in narrow.items()}
    error, alone = (
        np.sqrt(np.mean((np.asarray(found) - exact) ** 2)) / exact.std()
        for found in (logits, forward(name, variant)(ids, *counted(), rounded))
    )
    assert error < max(0.03, alone)


@family
def test_flops_lie_just_below_what_xla_counts(name):
    """XLA counts both halves of the causal scores, and every norm, rotation and softmax."""
    it = tiny(name, "every")
    config = it.config.model_copy(update={"hidden_size": 128, "intermediate_size": 512})
    length = 64
    abstract = jax.eval_shape(lambda: it.family.Model(config, rngs=nnx.Rngs(0)))
    abstract.layers.run = "unroll"  # a loop's body is counted once
    for _, module in nnx.iter_modules(abstract):
        if isinstance(module, MoE):
            module.dispatch = dispatch.dense  # one product for all experts

    def run(params, ids):
        return with_parameters(abstract, params)(ids)[0]

    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
    found: Any = jax.jit(run).lower(parameters(abstract), ids).cost_analysis()
    ratio = abstract.flops(2 * length, length) / found["flops"]
    assert 0.8 < ratio < 1.0


@pytest.mark.parametrize("key", SIZES)
@family
def test_a_size_of_nothing_is_refused_by_name(name, key):
    values = tiny(name).config.model_dump()
    if key in values:
        with pytest.raises(ConfigError, match=rf"model: key `{key}` = 0"):
            models.from_recipe({"family": name, **values, key: 0})


@family
def test_types_of_fewer_layers_than_there_are_are_refused(name):
    config = tiny(name).config
    if "layer_types" in type(config).model_fields:
        written = config.to_hf()
        for kind in set(written["layer_types"]):
            with pytest.raises(UserError, match="layer_types has 1 entries and num_hidden_layers"):
                models.from_hf({**written, "layer_types": [kind]}, "config.json")


@pytest.mark.parametrize("preset", models.presets())
def test_a_preset_survives_its_config_json(preset):
    module, config = models.presets()[preset]
    assert models.from_hf(config.to_hf(), preset) == (module, config)
