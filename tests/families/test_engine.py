"""The serving engine writes what full forward passes say, for every family."""

import jax
import numpy as np
import pytest

from ropewalk import models
from ropewalk.layers import cache
from ropewalk.serve.engine import Engine
from ropewalk.serve.packed import Segment
from ropewalk.serve.sizes import Sizes
from ropewalk.serve.slots import Settings
from tests.families.tiny import BATCH, LENGTH, counted, forward, tiny
from tests.serve.engines import Desk

# Pages of 4, two of which are looked at together. The two prompts are read in one row, the longer
# one in two chunks; windows and chunks of attention are 5 and 6 tokens.
SIZES, READ = Sizes(slots=2, length=LENGTH, page=4, chunk=LENGTH, pack=2), (11, 7)


@pytest.mark.parametrize("name", models.families())
def test_the_engine_writes_what_full_forwards_say(name, monkeypatch):
    monkeypatch.setattr(cache, "_TOGETHER", 8)
    made, rng = tiny(name), np.random.default_rng(0)
    long, short = (rng.integers(0, 64, length).tolist() for length in READ)
    new = LENGTH - len(long)
    desk = Desk(Engine(made.model(jax.tree.map(lambda x: x.copy(), made.params)), SIZES))
    tables = [desk.table(), desk.table()]
    carry = desk.prefill(Segment(long[:6], 0, tables[0])).carries[0]
    rest, whole = Segment(long[6:], 6, tables[0], carry), Segment(short, 0, tables[1])
    places = [(row, row, Settings(limit=new)) for row in range(2)]
    first = desk.insert(desk.prefill(rest, whole), *places)
    steps = desk.write(dict(enumerate(tables)), new - 1)
    ids, segments = np.zeros((2, BATCH, LENGTH), np.int32)
    scores = []
    for row, prompt in enumerate((long, short)):
        written = [first.token[row], *[chosen.token[0, row] for chosen in steps]]
        scores.append([first.logprob[row], *[chosen.logprob[0, row] for chosen in steps]])
        ids[row, : len(prompt) + new] = [*prompt, *written]
        segments[row, : len(prompt) + new] = 1
    logits = jax.nn.log_softmax(forward(name, "plain")(ids, counted()[0], segments))
    for row, length in enumerate(READ):
        found = logits[row, length - 1 : length + new - 1]
        assert np.argmax(found, axis=-1).tolist() == ids[row, length : length + new].tolist()
        np.testing.assert_allclose(scores[row], np.max(found, axis=-1), atol=1e-4)
