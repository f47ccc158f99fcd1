"""Tokens guessed ahead: the text is the one that is written without, in fewer steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.core.errors import ModelError
from ropewalk.serve.engine import Engine
from ropewalk.serve.lookup import lookup
from ropewalk.serve.slots import Settings
from tests.serve.engines import SIZES, Desk, engine, model, prompt, solo

GUESSING = dataclasses.replace(SIZES, drafts=3)
CLOSE = 3e-5
# Greedy; drawn; and drawn by what was written before.
SETTINGS = [
    Settings(limit=30),
    Settings(limit=30, temperature=0.8, seed=3),
    Settings(limit=30, temperature=0.4, seed=5, frequency=0.3, repetition=1.1, min_p=0.02),
]


pytestmark = pytest.mark.usefixtures("small_blocks")


# Attention that sees everything, and layers of it beside a window.
family = pytest.mark.parametrize("name", ["llama", "gemma2"])


@functools.cache
def made(name: str, how: str = "") -> Engine:
    """Without guesses; by a look back; by the same model; by another one."""
    draft = {"itself": (name,), "another": ("llama", "every")}.get(how)
    return engine(name, sizes=GUESSING if how else SIZES, draft=draft and model(*draft))


@family
@pytest.mark.parametrize("how", ["lookup", "itself", "another"])
@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "drawn", "penalized"])
def test_guesses_change_no_token(name, how, settings):
    tokens, scores = solo(made(name), prompt(0, 21), settings, [8])
    found, again = solo(made(name, how), prompt(0, 21), settings, [8])
    assert found == tokens
    np.testing.assert_allclose(again, scores, atol=CLOSE)


@family
def test_a_model_that_guesses_for_itself_is_always_right(name):
    """Every step writes the three guesses and one more, up to the limit."""
    for settings in SETTINGS[:2]:
        desk = Desk(made(name, "itself"))
        prefix, table = desk.read(prompt(1, 9))
        desk.state = made(name, "itself").tell(desk.state, 0, prompt(1, 9), [])
        desk.insert(prefix, (0, 0, settings))
        each = [c.emitted[:, 0].sum() for c in desk.write({0: table}, 8)]
        assert each == [4] * 7 + [1]


@family
def test_what_repeats_is_guessed(name):
    """A text of one token, by a bias: every guess of a look back is right."""
    desk = Desk(made(name, "lookup"))
    prefix, table = desk.read([5] * 9)
    desk.state = made(name, "lookup").tell(desk.state, 0, [5] * 9, [])
    desk.insert(prefix, (0, 0, Settings(limit=40, biases={5: 50.0})))
    found = desk.write({0: table}, 3)
    assert [c.emitted[:, 0].sum() for c in found] == [4, 4, 4]
    assert all(c.guessed[:, 0].tolist() == [False, True, True, True] for c in found)


@family
def test_neighbours_guess_apart(name):
    """Two sequences of different lengths and settings, in slots of their own."""
    both = SETTINGS[::2]
    wanted = [solo(made(name), prompt(i, 5 + 4 * i), one)[0] for i, one in enumerate(both)]
    desk, tables = Desk(made(name, "another")), {}
    told: dict[int, list[int]] = {}
    for i, one in enumerate(both):
        prefix, tables[i] = desk.read(prompt(i, 5 + 4 * i))
        desk.state = made(name, "another").tell(desk.state, i, prompt(i, 5 + 4 * i), [])
        told[i] = [int(desk.insert(prefix, (0, i, one)).token[0])]
    for chosen in desk.write(tables, 29):
        for i in told:
            told[i] += chosen.token[chosen.emitted[:, i], i].tolist()
    assert list(told.values()) == wanted


def test_fused_steps_guess_too():
    name = "llama"
    fused = engine(name, sizes=dataclasses.replace(GUESSING, steps=2))
    assert fused.sizes.lookahead == 8
    assert (
        solo(fused, prompt(0, 9), SETTINGS[0])[0] == solo(made(name), prompt(0, 9), SETTINGS[0])[0]
    )


@family
def test_nothing_is_written_beyond_the_pages_of_a_sequence(name):
    """A sequence has pages up to its last token, and none for guesses after it."""
    desk = Desk(made(name, "itself"))
    prefix, table = desk.read(prompt(2, 9))
    desk.state = made(name, "itself").tell(desk.state, 0, prompt(2, 9), [])
    desk.insert(prefix, (0, 0, Settings(limit=4)))
    own = [pages[:3] for pages in table]  # 12 places: 9 + 4, the last of which is never read
    before = jax.tree.map(np.asarray, desk.state.caches)
    desk.write({0: own}, 4)
    after = jax.tree.map(np.asarray, desk.state.caches)
    groups = made(name, "itself").groups
    for group, old, new in zip(groups, before, after, strict=True):
        assert group is not None
        others = np.delete(np.arange(len(old.buffers[0])), own[group])
        for a, b in zip(old.buffers, new.buffers, strict=True):
            assert np.array_equal(a[others], b[others])


@family
def test_a_grammar_takes_one_token_a_step_and_its_neighbour_all(name):
    bits = np.full((2, 2), 2**32 - 1, np.uint32)
    bits[0] = [1 << 5 | 1 << 9, 0]
    desk, tables = Desk(made(name, "itself")), {}
    for slot in range(2):
        prefix, tables[slot] = desk.read(prompt(slot, 9))
        desk.state = made(name, "itself").tell(desk.state, slot, prompt(slot, 9), [])
        desk.insert(prefix, (0, slot, Settings(limit=30)), bits=bits[slot : slot + 1])
    for chosen in desk.write(tables, 3, bits=bits):
        assert chosen.emitted.sum(axis=0).tolist() == [1, 4]
        assert chosen.token[0, 0] in (5, 9)
        assert not chosen.guessed[:, 0].any()


def test_a_look_back_finds_the_longest_and_the_latest():
    text = [1, 2, 3, 4, 9, 2, 3, 5, 7, 3, 6, 0, 2, 3]
    padded = jnp.asarray([[*text, 3, 8, 8], [*text, 3, 8, 8], [4] * 17])
    found = lookup(padded, jnp.asarray([13, 4, 3]), 4)
    # "2 3" twice, of which the later; 9 never before; and 4 again and again.
    assert np.asarray(found).tolist() == [[5, 7, 3, 6], [-1] * 4, [4] * 4]
    assert np.asarray(lookup(padded, jnp.asarray([0, 0, 0]), 2)).tolist() == [[-1, -1]] * 3


def test_who_cannot_guess_is_refused():
    with pytest.raises(ModelError, match="recurrent layers cannot take back"):
        engine("qwen3_next", sizes=GUESSING)
    with pytest.raises(ModelError, match="draft model's recurrent layers"):
        engine("llama", sizes=GUESSING, draft=model("qwen3_next"))
    with pytest.raises(ModelError, match="sees further than the 5 tokens"):
        engine("mistral", sizes=GUESSING, draft=model("llama"))
