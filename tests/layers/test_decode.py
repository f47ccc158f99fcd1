"""Writing several ragged prompts at once equals writing each alone; errors name the numbers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.core.errors import ConfigError, ModelError
from ropewalk.layers.decode import Decoder, Sampling
from ropewalk.parallel.axes import shardings
from ropewalk.transforms.layout import Layout
from tests.families.tiny import tiny

PROMPTS = [[5, 9, 1], [7], [3, 3, 60, 2, 2, 11, 4, 8, 9, 10]]
NEW = 9
NAME = "llama"


@functools.cache
def decoder():
    return Decoder(tiny(NAME).model())


def write(prompts, sampling, stops=(), decode=None):
    """Tokens and log-probabilities of each row, in the order in which they came."""
    rows: list[list[tuple[int, float]]] = [[] for _ in prompts]
    for row, token, logprob in (decode or decoder()).stream(prompts, sampling, stops):
        rows[row].append((token, logprob))
    return rows


@functools.cache
def greedy():
    return write(PROMPTS, Sampling(max_new_tokens=NEW))


def ids(rows):
    return [[token for token, _ in row] for row in rows]


def test_ragged_prompts_together_equal_each_alone():
    for prompt, together in zip(PROMPTS, greedy(), strict=True):
        (alone,) = write([prompt], Sampling(max_new_tokens=NEW))
        assert [token for token, _ in alone] == [token for token, _ in together]
        np.testing.assert_allclose(
            [score for _, score in alone], [score for _, score in together], rtol=1e-4, atol=1e-5
        )


def test_every_row_gets_all_its_tokens():
    assert [len(row) for row in greedy()] == [NEW] * len(PROMPTS)


def test_a_prompt_continued_with_its_own_words_goes_on_alike():
    longer = [prompt + row[:4] for prompt, row in zip(PROMPTS, ids(greedy()), strict=True)]
    rest = write(longer, Sampling(max_new_tokens=NEW - 4))
    assert ids(rest) == [row[4:] for row in ids(greedy())]


def test_a_stop_token_ends_its_row_only_and_is_yielded():
    stop = ids(greedy())[0][3]
    rows = ids(write(PROMPTS, Sampling(max_new_tokens=NEW), stops=(stop,)))
    for row, whole in zip(rows, ids(greedy()), strict=True):
        end = whole.index(stop) + 1 if stop in whole else NEW
        assert row == whole[:end]
    assert len(rows[0]) <= 4


def test_writing_ends_when_every_row_has_stopped():
    rows = ids(write(PROMPTS, Sampling(max_new_tokens=NEW), stops=range(64)))
    assert rows == [row[:1] for row in ids(greedy())]


def test_a_seed_gives_the_same_text_and_another_seed_another():
    hot = [
        ids(write(PROMPTS, Sampling(max_new_tokens=NEW, temperature=2.0, seed=s)))
        for s in (1, 1, 2)
    ]
    assert hot[0] == hot[1] != hot[2]
    assert hot[0] != ids(greedy())


def test_top_k_of_one_is_greedy_at_any_temperature():
    rows = write(PROMPTS, Sampling(max_new_tokens=NEW, temperature=5.0, top_k=1))
    assert ids(rows) == ids(greedy())


def test_refresh_takes_new_weights_without_compiling_again():
    it = tiny(NAME)
    mine = Decoder(it.model())
    sampling = Sampling(max_new_tokens=NEW)
    assert ids(write(PROMPTS, sampling, decode=mine)) == ids(greedy())
    other = it.model({path: value[..., ::-1] for path, value in it.params.items()})
    mine.refresh(other)
    changed = write(PROMPTS, sampling, decode=mine)
    assert ids(changed) == ids(write(PROMPTS, sampling, decode=Decoder(other))) != ids(greedy())
    mine.refresh(it.model())
    assert write(PROMPTS, sampling, decode=mine) == greedy()


def test_prompts_of_like_length_share_their_programs():
    fresh: Any = Decoder(tiny(NAME).model())
    write([[1, 2, 3]], Sampling(max_new_tokens=4), decode=fresh)
    compiled = fresh._prefill._cache_size(), fresh._decode._cache_size()
    write([[4, 5, 6, 7, 8]], Sampling(max_new_tokens=6, temperature=0.7, top_k=3), decode=fresh)
    assert (fresh._prefill._cache_size(), fresh._decode._cache_size()) == compiled == (1, 1)


def test_the_whole_of_the_positions_can_be_used():
    length = tiny(NAME).config.max_position_embeddings
    (row,) = write([[1, 2, 3]], Sampling(max_new_tokens=length - 3))
    assert len(row) == length - 3


def test_by_default_as_much_is_written_as_the_longest_prompt_leaves_room_for():
    rows = write([[1, 2, 3], [4] * 50], Sampling())
    assert [len(row) for row in rows] == [64 - 50, 64 - 50]


def test_what_cannot_fit_is_refused_before_a_token_is_asked_for():
    with pytest.raises(ModelError, match="64 positions"):
        decoder().stream([[1] * 60], Sampling(max_new_tokens=5))
    with pytest.raises(ModelError, match="64 positions"):
        decoder().stream([[1] * 64], Sampling())


@pytest.mark.parametrize(
    ("prompts", "new", "words"),
    [
        ([[1], []], 4, ["prompt 1 has no tokens"]),
        ([[1, 64]], 4, ["token 64", "0 to 63"]),
        ([[1] * 60], 5, ["60 tokens", "5 new", "64 positions", "max_new_tokens"]),
    ],
)
def test_what_cannot_be_written_is_refused_with_its_numbers(prompts, new, words):
    with pytest.raises(ModelError) as refusal:
        write(prompts, Sampling(max_new_tokens=new))
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"topk": 3}, "did you mean `top_k`"),
    ],
)
def test_sampling_refuses_impossible_values(values, key):
    with pytest.raises(ConfigError, match=key):
        Sampling.parse(values, "sampling")


def test_weights_spread_over_a_mesh_write_the_same():
    from_mesh = _on_mesh()
    rows = write(PROMPTS, Sampling(max_new_tokens=NEW), decode=Decoder(from_mesh))
    assert ids(rows) == ids(greedy())


def _on_mesh():
    it = tiny(NAME)
    placement = Layout(rules="fsdp_tensor").place()
    where = shardings(it.table, placement)
    return it.model({path: jax.device_put(value, where[path]) for path, value in it.params.items()})


def test_bfloat16_scores_what_the_full_forward_scores():
    it = tiny(NAME)
    model = jax.tree.map(lambda p: p.astype(jnp.bfloat16), it.model())
    prompt = PROMPTS[2]
    (row,) = write([prompt], Sampling(max_new_tokens=NEW), decode=Decoder(model))
    tokens = jnp.asarray([prompt + [token for token, _ in row]], jnp.int32)
    full = jax.tree.map(lambda p: p.astype(jnp.bfloat16), it.model())
    scores = jax.nn.log_softmax(full(tokens)[0][0], axis=-1)
    for place, (token, score) in enumerate(row, len(prompt) - 1):
        # bfloat16 rounds each layer's output; the two ways add in another order.
        np.testing.assert_allclose(score, scores[place, token], rtol=0.05, atol=0.05)
