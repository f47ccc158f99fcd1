"""The engine against the plain decoder and against itself: packed, chunked, shared, moved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.core.errors import ModelError
from ropewalk.layers import cache as caches
from ropewalk.ops.kernels import cpu
from ropewalk.parallel import mesh
from ropewalk.parallel.axes import Placement, shardings
from ropewalk.parallel.rules import RULES
from ropewalk.serve.engine import Engine
from ropewalk.serve.packed import Segment
from ropewalk.serve.slots import Settings
from ropewalk.serve.transfer import carried, put, stacked, take, unstacked
from tests.families.tiny import tiny
from tests.serve.engines import SIZES, Desk, engine, prompt, solo

# Attention that sees everything, layers of it beside recurrent ones, and beside a window.
FAMILIES = ["llama", "qwen3_next", "gemma2"]
NEW = 30
CLOSE = 3e-5  # log-probabilities of logits up to 10: float32 sums in another order


pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def made(name):
    return engine(name)


def test_packed_prompts_are_as_apart(made):
    prompts = [prompt(1, 7), prompt(2, 13), prompt(3, 5)]
    alone = [solo(made, one, Settings(limit=NEW)) for one in prompts]
    desk = Desk(made)
    tables = [desk.table() for _ in prompts]
    prefix = desk.prefill(*[Segment(one, 0, t) for one, t in zip(prompts, tables, strict=True)])
    first = desk.insert(prefix, *[(i, i + 1, Settings(limit=NEW)) for i in range(3)])
    rest = desk.write({i + 1: table for i, table in enumerate(tables)}, NEW - 1)
    for i, (tokens, scores) in enumerate(alone):
        assert [first.token[i], *[c.token[0, i] for c in rest]] == tokens
        found = [first.logprob[i], *[c.logprob[0, i] for c in rest]]
        np.testing.assert_allclose(found, scores, atol=CLOSE)


@pytest.mark.parametrize("cut", [[1], [4, 8], [3, 4, 20]])
def test_chunks_are_as_the_whole(made, cut):
    tokens, scores = solo(made, prompt(0, 21), Settings(limit=NEW))
    again, found = solo(made, prompt(0, 21), Settings(limit=NEW), cut)
    assert again == tokens
    np.testing.assert_allclose(found, scores, atol=CLOSE)


def test_a_beginning_that_is_cached_is_not_read_again(made):
    """Two sequences share pages of their first 8 tokens; the second reads its rest only."""
    start, ends = prompt(5, 8), [prompt(6, 9), prompt(7, 4)]
    wanted = [solo(made, start + end, Settings(limit=NEW))[0] for end in ends]
    desk = Desk(made)
    shared = desk.table(2)
    carry = desk.prefill(Segment(start, 0, shared)).carries[0]
    own = [[a + b for a, b in zip(shared, desk.table(11), strict=True)] for _ in ends]
    segments = [Segment(end, 8, table, carry) for end, table in zip(ends, own, strict=True)]
    prefix = desk.prefill(*segments)
    first = desk.insert(prefix, (0, 0, Settings(limit=NEW)), (1, 1, Settings(limit=NEW)))
    rest = desk.write({0: own[0], 1: own[1]}, NEW - 1)
    for i in range(2):
        assert [first.token[i], *[c.token[0, i] for c in rest]] == wanted[i]


def test_one_prompt_is_sampled_several_times(made):
    """Full pages are shared, the last one is copied, and every answer is that of its seed."""
    one, sampled = prompt(8, 10), Settings(limit=12, temperature=1.0)
    settings = [dataclasses.replace(sampled, seed=seed) for seed in range(3)]
    wanted = [solo(made, one, each)[0] for each in settings]
    assert len({tuple(each) for each in wanted}) > 1
    desk = Desk(made)
    prefix, table = desk.read(one)
    tables = [table]
    for _ in range(2):
        own = desk.table(9)
        for group, pages in enumerate(own):
            desk.state = made.copy(desk.state, group, table[group][2], pages[0])
        tables.append([t[:2] + pages for t, pages in zip(table, own, strict=True)])
    first = desk.insert(prefix, *[(0, i, each) for i, each in enumerate(settings)])
    rest = desk.write(dict(enumerate(tables)), 11)
    for i in range(3):
        assert [first.token[i], *[c.token[0, i] for c in rest]] == wanted[i]


def test_a_prefix_moves_to_another_engine_as_one_array_a_leaf(made):
    """Taken, stacked where layers are alike, unstacked, put elsewhere: bit for bit."""
    one = prompt(9, 11)
    wanted = solo(made, one, Settings(limit=NEW))[0]
    here, there = Desk(made), Desk(made)
    prefix, table = here.read(one)
    used = [pages[:3] for pages in table]
    kept = take(made, here.state, used, prefix.carries[0])
    again = unstacked(made, jax.tree.map(np.asarray, stacked(made, kept)))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        assert a.dtype == b.dtype and (np.asarray(a) == np.asarray(b)).all()
    there.table(5)  # other pages than here
    target = there.table()
    there.state = put(made, there.state, again, [pages[:3] for pages in target])
    moved = dataclasses.replace(prefix, carries=[carried(made, again)] * len(prefix.carries))
    first = there.insert(moved, (0, 2, Settings(limit=NEW)))
    rest = there.write({2: target}, NEW - 1)
    assert [first.token[0], *[c.token[0, 0] for c in rest]] == wanted


def test_the_rest_of_the_batch_changes_nothing(made):
    """The same seed gives the same tokens whatever the neighbours do, and whenever they end."""
    settings = Settings(limit=20, temperature=1.0, seed=7, top_k=20, frequency=0.5)
    wanted = solo(made, prompt(10, 9), settings)[0]
    desk = Desk(made)
    others = [Settings(limit=4), Settings(limit=25, temperature=2.0, biases={5: 9.0})]
    tables = {}
    for slot, other in enumerate(others):
        prefix, tables[slot] = desk.read(prompt(20 + slot, 6))
        desk.insert(prefix, (0, slot, other))
    desk.write(tables, 3)
    prefix, tables[2] = desk.read(prompt(10, 9))
    desk.state = made.tell(desk.state, 2, prompt(10, 9), [])
    first = desk.insert(prefix, (0, 2, settings))
    rest = desk.write(tables, 19)
    assert [first.token[0], *[c.token[0, 2] for c in rest]] == wanted


def test_a_prompt_is_scored(made, name):
    """Scores of a scored prefill are log-probabilities of the full forward pass."""
    one = prompt(11, 12)
    desk = Desk(made)
    prefix = desk.prefill(Segment(one, 0, desk.table(), following=3), scored=True)
    assert prefix.scores is not None
    found, which, told = (np.asarray(x)[:12] for x in prefix.scores)
    model = tiny(name).model()
    full = jax.nn.log_softmax(jax.jit(model)(jnp.asarray([one]))[0][0])
    np.testing.assert_allclose(found, np.asarray(full)[np.arange(12), [*one[1:], 3]], atol=CLOSE)
    best = np.sort(np.asarray(full))[:, ::-1][:, :20]
    np.testing.assert_allclose(told, best, atol=CLOSE)
    assert (which[:, 0] == np.argmax(full, axis=-1)).all()


@pytest.fixture(scope="module")
def llama():
    return engine("llama")


def test_fused_steps_are_single_ones(llama):
    settings = Settings(limit=18, temperature=0.7, seed=3)
    fused = engine("llama", sizes=dataclasses.replace(SIZES, steps=4))
    assert solo(fused, prompt(0, 9), settings)[0] == solo(llama, prompt(0, 9), settings)[0]


def test_a_slot_stops_by_itself(llama):
    """At a stop token, told too, or at its limit; and then writes nothing."""
    free = solo(llama, prompt(0, 9), Settings(limit=20))[0]
    stop = free[6]
    ended = free[: free.index(stop) + 1]
    desk = Desk(llama)
    prefix, table = desk.read(prompt(0, 9))
    first = desk.insert(prefix, (0, 0, Settings(limit=20, stops=(stop,))))
    rest = desk.write({0: table}, 12)
    told = [first.token[0], *[c.token[0, 0] for c in rest if c.emitted[0, 0]]]
    assert told == ended
    before = jax.tree.map(np.asarray, desk.state.caches)
    desk.write({0: table}, 2)
    after = jax.tree.map(np.asarray, desk.state.caches)
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))


def test_a_slot_is_as_it_was_where_it_goes_on_later(llama):
    """Read again with what it had written, it goes on as if it had not been interrupted."""
    settings = Settings(limit=20, temperature=1.0, seed=5, presence=0.4, repetition=1.3)
    one = prompt(12, 9)

    def write(written: list[int]) -> list[int]:
        desk = Desk(llama)
        prefix, table = desk.read([*one, *written])
        desk.state = llama.tell(desk.state, 0, one, written)
        now = dataclasses.replace(settings, written=len(written))
        first = desk.insert(prefix, (0, 0, now))
        rest = desk.write({0: table}, 19 - len(written))
        emitted = [first.token[0], *[c.token[0, 0] for c in rest if c.emitted[0, 0]]]
        return [*written, *map(int, emitted)]

    whole = write([])
    assert write(whole[:7]) == whole


def test_bits_hold_the_tokens(llama):
    bits = np.zeros((1, 2), np.uint32)
    bits[0, 0] = 1 << 5 | 1 << 9
    desk = Desk(llama)
    prefix, table = desk.read(prompt(0, 9))
    sampled = Settings(limit=20, temperature=1.0)
    first = desk.insert(prefix, (0, 0, sampled), bits=bits)
    rest = desk.write({0: table}, 15, bits=bits)
    assert {int(first.token[0]), *[int(c.token[0, 0]) for c in rest]} == {5, 9}


def test_int8_stays_near_and_takes_zeros(llama):
    narrow = engine("llama", sizes=dataclasses.replace(SIZES, cache="int8"))
    tokens, scores = solo(llama, prompt(0, 21), Settings(limit=NEW))
    desk = Desk(narrow)
    prefix, table = desk.read(prompt(0, 21))
    desk.insert(prefix, (0, 0, Settings(limit=NEW, biases={tokens[0]: 100.0})))
    found = desk.write({0: table}, 1)[0]
    # 8 bits of keys and values: a hundredth of a nat or two on these far-from-flat weights.
    assert abs(found.logprob[0, 0] - scores[1]) < 0.05 or found.token[0, 0] != tokens[1]
    zeros = caches.Paged.empty(2, 4, [(2, 8)], jnp.int8)
    one = jnp.ones((1, 1), jnp.int32)
    view = caches.View(one * 0, one * 0, one * 0, one * 0, jnp.int32(1))
    kept = dataclasses.replace(zeros, view=view)._put((jnp.zeros((1, 1, 2, 8)),))
    assert np.isfinite(kept.scales[0]).all() and not np.asarray(kept.buffers[0]).any()


def test_pages_take_no_more_memory_than_there_is(llama):
    all_ = llama.pages_bytes
    held = sum(x.nbytes for x in jax.tree.leaves(llama.init_decode_state().caches))
    assert held == all_ and llama.sizes.pages == (64,)
    half = engine("llama", sizes=dataclasses.replace(SIZES, memory=all_ // 2))
    assert half.pages_bytes == all_ // 2 and half.sizes.pages == (32,)
    with pytest.raises(ModelError, match=r"8 pages of 4 tokens in 0.0 GiB cannot hold one"):
        engine("llama", sizes=dataclasses.replace(SIZES, memory=all_ // 8))


def test_what_cannot_be_is_refused(llama):
    with pytest.raises(ModelError, match="65 tokens are asked for; the model has 64"):
        engine("llama", sizes=dataclasses.replace(SIZES, length=65))
    with pytest.raises(ModelError, match="15 pages of 4 tokens cannot hold one sequence of 64"):
        engine("llama", sizes=dataclasses.replace(SIZES, pages=(15,)))
    desk = Desk(llama)
    with pytest.raises(ModelError, match="33 tokens"):
        desk.prefill(Segment(prompt(0, 33), 0, desk.table()))
    with pytest.raises(ModelError, match="takes 1 to 3"):
        desk.prefill(*[Segment([1], 0, desk.table(1))] * 4)


@pytest.mark.parametrize(
    ("family", "rules"),
    [
        ("llama", "tensor"),
        ("qwen3_next", "fsdp_tensor"),
        ("mixtral", "fsdp_expert"),
    ],
)
def test_eight_devices_write_the_tokens_of_one(family, rules):
    it, devices = tiny(family), jax.devices()
    sizes = mesh.default_sizes(rules, len(devices))
    placement = Placement(mesh.build(sizes, devices), RULES[rules])
    spread = jax.device_put(it.params, shardings(it.table, placement))
    many = Engine(it.model(spread), SIZES)
    pools = [c for c in many.init_decode_state().caches if isinstance(c, caches.Paged)]
    split = {not pool.sharding.is_fully_replicated for one in pools for pool in one.buffers}
    assert split == {"tensor" in rules}
    settings = Settings(limit=12, temperature=0.8, seed=2)
    tokens, scores = solo(engine(family), prompt(0, 21), settings)
    found, again = solo(many, prompt(0, 21), settings, [8])
    assert found == tokens
    np.testing.assert_allclose(again, scores, atol=CLOSE)


def test_bfloat16_decodes_what_it_would_train_on(name):
    """Log-probabilities of a decoded text are those of a full forward pass in the same weights,
    but for the rounding to 8 bits in another order: 0.03 to 0.08 nats on these weights, which are
    far from flat."""
    it = tiny(name, "every")
    narrow = {path: value.astype(jnp.bfloat16) for path, value in it.params.items()}
    made = Engine(it.model(narrow), SIZES)
    one, new = prompt(3, 12), 12
    tokens, scores = solo(made, one, Settings(limit=new))
    logits = jax.jit(lambda params, ids: it.model(params)(ids)[0])(
        narrow, jnp.asarray([[*one, *tokens]])
    )
    full = np.asarray(jax.nn.log_softmax(logits[0]))[11:-1]
    assert np.max(np.abs(full[np.arange(new), tokens] - scores)) < 0.15


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="JAX's device here is no CPU")
def test_with_kernels_for_a_cpu_the_batch_does_not_change_a_bit(monkeypatch):
    """A sequence's log-probabilities in bfloat16 are those of a full pass but for rounding, and the
    same bits alone as beside others, one of which is far longer."""
    it = tiny("llama", "every")
    narrow = {path: value.astype(jnp.bfloat16) for path, value in it.params.items()}
    monkeypatch.setattr(cpu, "ready", lambda: True)
    assert cpu.built() is None
    desk = Desk(Engine(it.model(narrow), SIZES))
    prompts = [prompt(3, 12), prompt(4, 30), prompt(5, 2)]
    tables = [desk.table() for _ in prompts]
    found, first = [], -1
    for slots in ([0], [0, 1, 2]):
        for slot in slots:
            prefix = desk.prefill(Segment(prompts[slot], 0, tables[slot]))
            chosen = desk.insert(prefix, (0, slot, Settings(limit=NEW)))
            first = int(chosen.token[0]) if slot == 0 else first
        wrote = desk.write({slot: tables[slot] for slot in slots}, 12)
        found.append([(int(c.token[0, 0]), float(c.logprob[0, 0])) for c in wrote])
    assert found[0] == found[1]
    monkeypatch.setattr(cpu, "ready", lambda: False)
    text = [*prompts[0], first, *[token for token, _ in found[0]]]
    logits = jax.jit(lambda params, ids: it.model(params)(ids)[0])(narrow, jnp.asarray([text]))
    full = np.asarray(jax.nn.log_softmax(logits[0]))[12:-1]
    for row, (token, score) in zip(full, found[0], strict=True):
        assert abs(row[token] - score) < 0.15  # as above


def test_a_decoding_step_copies_no_pages(llama):
    """The temporaries of a step are far less than its pages, however many there are."""
    sizes = dataclasses.replace(SIZES, pages=(4096,))
    made = engine("llama", sizes=sizes)
    state = made.init_decode_state()
    held = sum(x.nbytes for x in jax.tree.leaves(state.caches))
    table = (np.zeros((4, made.width), np.int32),)
    bits = made._bits(None, 4)
    lowered = made._generate.lower(made._weights, state, np.arange(4, dtype=np.int32), table, *bits)
    used = lowered.compile().memory_analysis()
    assert used is not None and used.alias_size_in_bytes >= held
    assert used.temp_size_in_bytes < held / 10
