import contextlib
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ropewalk.serve.request import Sequence, Status
from ropewalk.serve.scheduler import Chunk, Limits, Plan, QueueFull, Scheduler, Unservable

ALPHABET = 4


def after(history: int, token: int) -> int:
    return hash((history, token))


def histories(tokens: tuple[int, ...], salt: bytes) -> list[int]:
    """For each token, a number that stands for all up to it; the first one is for none."""
    return list(itertools.accumulate(tokens, after, initial=salt[0] if salt else 255))


def following(history: int) -> int:
    return history // 7 % ALPHABET


def solo(sequence: Sequence) -> tuple[list[int], str]:
    written: list[int] = []
    history = histories(sequence.prompt, sequence.salt)[-1]
    while len(written) < sequence.max_tokens:
        token = following(history)
        written.append(token)
        history = after(history, token)
        if token in sequence.stops:
            return written, "stop"
    return written, "length"


@dataclass
class Slot:
    history: list[int] = field(default_factory=list)  # of every token, the sampled ones too
    state: int = 0  # what recurrent layers made of the tokens that went through


class Device:
    """Runs a plan at once, with the tables of that moment; every key has the history of its token,
    and a query must find at each place that it sees the history of its own sequence."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.places: list[dict[tuple[int, int], int]] = [{} for _ in limits.pages]
        self.slots = [Slot() for _ in range(limits.slots)]

    def run(self, plan: Plan, scheduler: Scheduler) -> list[tuple[Sequence, list[int]]]:
        sampled = self.prefill(plan.chunks, scheduler)
        return sampled + self.decode(plan.rows)

    def prefill(self, chunks: list[Chunk], scheduler: Scheduler) -> list[tuple[Sequence, Any]]:
        sampled, writes = [], []
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.slot is not None
            slot = self.slots[sequence.slot]
            history = histories(sequence.tokens, sequence.salt)
            if self.limits.snapshots:
                before = history[chunk.start]
                assert chunk.start == 0 or before == (chunk.state or slot.state)
                assert chunk.start or chunk.state is None
            # Of others it sees only what earlier programs wrote.
            self.check(sequence, history, chunk.start, chunk.start)
            writes += self.write(sequence, history, chunk.start, chunk.end)
            slot.state = history[chunk.end]
            assert chunk.last == (chunk.end == sequence.length)
            if chunk.keep is not None:
                assert chunk.end % self.limits.page == 0
                scheduler.keep(chunk.keep, slot.state)
            if chunk.last:
                slot.history = [*history, after(history[-1], following(history[-1]))]
                sampled.append((sequence, [following(history[-1])]))
        assert max(Counter(writes).values(), default=1) == 1, "a place is written by two"
        for chunk in chunks:
            history = histories(chunk.sequence.tokens, chunk.sequence.salt)
            for position in range(chunk.start, chunk.end):
                self.check(chunk.sequence, history, position, position + 1)
        return sampled

    def decode(self, rows: list[Sequence]) -> list[tuple[Sequence, list[int]]]:
        """Each row takes its last token and guesses, some of which prove right."""
        sampled, writes = [], []
        ahead = self.limits.lookahead
        for sequence in rows:
            assert sequence.slot is not None
            history, tokens = self.slots[sequence.slot].history, []
            length = len(history) - 1
            for _ in range(min(1 + history[-1] % ahead, sequence.longest - length)):
                tokens.append(following(history[-1]))
                history.append(after(history[-1], tokens[-1]))
            guesses = [*history[: length + len(tokens)], *[-1] * ahead]
            writes += self.write(sequence, guesses, length - 1, length - 1 + ahead)
            for position in range(length - 1, length - 1 + len(tokens)):
                self.check(sequence, history, position, position + 1)
            self.slots[sequence.slot].state = history[-2]
            sampled.append((sequence, tokens))
        assert max(Counter(writes).values(), default=1) == 1, "a place is written by two"
        return sampled

    def write(self, sequence: Sequence, history: list[int], start: int, end: int) -> list[Any]:
        page, written = self.limits.page, []
        for group, (places, table) in enumerate(zip(self.places, sequence.tables, strict=True)):
            for position in range(start, min(end, sequence.longest)):
                number = table[position // page]
                assert number >= 0, "written where nothing is"
                places[number, position % page] = history[position + 1]
                written.append((group, number, position % page))
        return written

    def check(self, sequence: Sequence, history: list[int], position: int, end: int) -> None:
        page = self.limits.page
        for group, (places, table) in enumerate(zip(self.places, sequence.tables, strict=True)):
            span = self.limits.spans[group]
            for seen in range(0 if span is None else max(position - span + 1, 0), end):
                assert places.get((table[seen // page], seen % page)) == history[seen + 1]


class Engine:
    """The loop around a scheduler, a step behind its device, that checks all that must hold."""

    def __init__(self, limits: Limits, behind: int = 1) -> None:
        self.limits, self.behind = limits, behind
        self.scheduler, self.device = Scheduler(limits), Device(limits)
        self.flying: list[list[tuple[Sequence, list[int]]]] = []
        self.live: list[Sequence] = []
        self.ended: list[Sequence] = []

    def add(self, prompt: Any, max_tokens: int = 1, **more: Any) -> Sequence:
        sequence = Sequence(tuple(prompt), max_tokens, **more)
        self.scheduler.add(sequence)
        self.live.append(sequence)
        return sequence

    def step(self, cancelled: int | None = None, apart: Sequence | None = None) -> Plan:
        plan = self.scheduler.plan(apart)
        self.check_plan(plan)
        members = [*plan.rows, *(chunk.sequence for chunk in plan.chunks)]
        assert apart is None or all(member is apart for member in members)
        self.check_pages()
        self.flying.append(self.device.run(plan, self.scheduler))
        if cancelled is not None and self.live:
            self.scheduler.cancel(self.live[cancelled % len(self.live)])
        while len(self.flying) > (self.behind if apart is None else 0):
            for sequence, tokens in self.flying.pop(0):
                self.scheduler.commit(sequence, tokens)
        self.check_pages()
        for sequence in [s for s in self.live if s.status is Status.FINISHED]:
            self.check_end(sequence)
            self.live.remove(sequence)
            self.ended.append(sequence)
        return plan

    def finish(self) -> int:
        """Steps until all is done."""
        bound = 20 + 4 * sum(len(s.prompt) + s.max_tokens for s in self.live)
        steps = 0
        while not self.scheduler.idle:
            steps += 1
            assert steps <= bound, "somebody starves"
            self.step()
        for _ in range(self.behind + 1):
            assert self.step() == Plan()
        assert not self.live
        for sequence in self.ended:  # and nothing was added later
            self.check_end(sequence)
        assert sorted(self.scheduler._slots) == list(range(self.limits.slots))
        assert all(pool.available == pool.count for pool in self.scheduler.pools)
        assert self.scheduler.usage == 0.0
        return steps

    def check_plan(self, plan: Plan) -> None:
        limits, scheduler = self.limits, self.scheduler
        assert sum(chunk.end - chunk.start for chunk in plan.chunks) <= limits.budget
        assert len(plan.chunks) <= limits.pack
        assert all(chunk.start < chunk.end for chunk in plan.chunks)
        for group in range(len(limits.pages)):
            looked = [
                limits.blocks(c.end) - limits.first(group, c.start) for c in plan.chunks
            ]  # fmt: skip
            assert sum(looked) <= limits.width
        members = [*plan.rows, *(chunk.sequence for chunk in plan.chunks)]
        assert len(set(members)) == len(members) <= limits.slots
        active = scheduler._active
        for ordered in (active, scheduler._waiting):
            assert [s.order for s in ordered] == sorted(s.order for s in ordered)
        assert set(members) <= set(active)
        assert len({s.slot for s in active} - {None}) == len(active) == scheduler.running
        assert scheduler.running + scheduler.waiting == len(
            [s for s in self.live if s.status is not Status.FINISHED]
        )
        assert all(len(s.written) + s.ahead < s.max_tokens + limits.lookahead for s in plan.rows)
        partly = [s for s in active if s.status is Status.PREFILLING]
        if limits.snapshots:  # their ends are prefilled apart
            partly = [s for s in partly if s.length - s.computed >= limits.page]
        assert len(partly) <= 1

    def check_pages(self) -> None:
        active = self.scheduler._active
        for group, pool in enumerate(self.scheduler.pools):
            holders = Counter(
                page for s in active for page in s.tables[group] if page >= 0
            )  # fmt: skip
            assert [holders[page] for page in range(pool.count)] == pool._holders
            assert pool.used == len(holders)
            for page, count in holders.items():
                assert count == 1 or pool._key[page], "an unpublished page is shared"

    def check_end(self, sequence: Sequence) -> None:
        written, reason = solo(sequence)
        if sequence.reason == "cancelled":
            assert sequence.written == written[: len(sequence.written)]
        else:
            assert (sequence.written, sequence.reason) == (written, reason)
        assert sequence.slot is None
        assert not sequence.tables
        assert not sequence.cached or sequence.reuse


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    spans = draw(st.sampled_from([(None,), (None,), (None, 3), (5, None), (4,), (2, 7), ()]))
    snapshots = draw(st.sampled_from([1, 4] if spans == () else [0, 0, 1, 4]))
    page = draw(st.integers(1, 4))
    return Limits(
        slots=draw(st.integers(1, 5)),
        page=page,
        pages=tuple(-(-draw(st.integers(18, 40)) // page) for _ in spans),
        spans=spans,
        budget=draw(st.integers(page if snapshots else 1, 14)),
        pack=draw(st.integers(1, 4)),
        width=-(-draw(st.integers(28, 60)) // page),
        queue=draw(st.integers(2, 12)),
        lookahead=draw(st.sampled_from([1, 4])),
        snapshots=snapshots,
    )


PIECES = st.sampled_from([(), (0, 1, 2, 0, 1, 2), (0, 0, 0, 0), (0,), (1, 1, 1, 1, 1, 1, 1, 1, 1)])
PROMPTS = st.tuples(PIECES, PIECES, st.sampled_from([(0,), (1,), (2, 0)])).map(
    lambda parts: tuple(itertools.chain(*parts))
)
REQUESTS = st.fixed_dictionaries(
    {
        "prompt": PROMPTS,
        "max_tokens": st.integers(1, 12),
        "priority": st.sampled_from([0, 0, -1, 1]),
        "stops": st.sampled_from([frozenset(), frozenset(), frozenset({3})]),
        "salt": st.sampled_from([b"", b"", b"", b"a"]),
        "reuse": st.sampled_from([True, True, True, False]),
    }
)


class Serving(RuleBasedStateMachine):
    @initialize(limits=limits(), behind=st.sampled_from([1, 1, 0]))
    def begin(self, limits: Limits, behind: int) -> None:
        self.engine = Engine(limits, behind)
        self.lost = False

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=6))
    def arrive(self, requests: list[dict[str, Any]]) -> None:
        for request in requests:
            full = self.engine.scheduler.waiting >= self.engine.limits.queue
            try:
                self.engine.add(**request)
                assert not full
            except QueueFull:
                assert full
            except Unservable:
                assert self.engine.limits.pages

    @rule(times=st.integers(1, 8))
    def work(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()

    @precondition(lambda self: self.engine.live)
    @rule(index=st.integers(0, 99), late=st.booleans())
    def cancel(self, index: int, late: bool) -> None:
        if not late:
            self.engine.scheduler.cancel(self.engine.live[index % len(self.engine.live)])
            self.engine.check_pages()
        self.engine.step(index if late else None)

    @precondition(lambda self: not self.lost)
    @rule(apart=st.booleans())
    def lose(self, apart: bool) -> None:
        """Then, as the service does, who ran writes a token apart from the others, where it has
        room."""
        self.lost, ran = True, list(self.engine.scheduler._active)
        self.engine.scheduler.restart()
        self.engine.device, self.engine.flying = Device(self.engine.limits), []
        for sequence in ran if apart else []:
            plan = None
            while sequence.status is not Status.FINISHED and plan != Plan():
                plan = self.engine.step(apart=sequence)
                if plan.rows:
                    break

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.finish()


Serving.TestCase.settings = settings(max_examples=400, stateful_step_count=25, deadline=None)
TestServing = Serving.TestCase


def make(**more: Any) -> Engine:
    """An engine with plenty of everything but for what a test names."""
    plenty: dict[str, Any] = {
        "slots": 8, "page": 4, "pages": (64,), "spans": (None,), "budget": 64, "pack": 8,
        "width": 64, "queue": 64,
    }  # fmt: skip
    return Engine(Limits(**plenty | more))


def chunks(plan: Plan) -> list[tuple[Sequence, int, int, bool]]:
    return [(c.sequence, c.start, c.end, c.last) for c in plan.chunks]


def test_a_row_follows_its_last_chunk_at_once_and_ends_with_what_is_ahead() -> None:
    engine = make()
    one, two = engine.add([1] * 5, 3), engine.add([2], 1)
    assert chunks(engine.step()) == [(one, 0, 5, True), (two, 0, 1, True)]
    assert (one.written, one.ahead, one.status) == ([], 1, Status.RUNNING)
    assert engine.step().rows == [one]
    assert (len(one.written), one.ahead) == (1, 1)
    assert engine.step().rows == [one]
    assert engine.step().rows == []
    assert one.reason == two.reason == "length"
    engine.finish()


def test_order_is_arrival_and_priority() -> None:
    engine = make(slots=1)
    late = engine.add([0], priority=1)
    first, second = engine.add([1]), engine.add([2])
    urgent = engine.add([3], priority=-1)
    served = []
    while not engine.scheduler.idle:
        served += [chunk.sequence for chunk in engine.step().chunks]
    assert served == [urgent, first, second, late]


def test_priority_is_worth_64_arrivals() -> None:
    engine = make(slots=1, queue=99)
    late = engine.add([0], priority=1)
    others = [engine.add([1]) for _ in range(70)]
    served = []
    while not engine.scheduler.idle:
        served += [chunk.sequence for chunk in engine.step().chunks]
    assert served == [*others[:63], late, *others[63:]]


def test_a_long_prompt_is_prefilled_in_chunks_and_goes_first() -> None:
    engine = make(budget=10)
    short, long, waiting = engine.add([0] * 3), engine.add([1] * 20), engine.add([2] * 3)
    assert chunks(engine.step()) == [(short, 0, 3, True), (long, 0, 7, False)]
    urgent = engine.add([3] * 9, priority=-1)
    assert chunks(engine.step()) == [(long, 7, 17, False)]
    assert chunks(engine.step()) == [(long, 17, 20, True), (urgent, 0, 7, False)]
    assert chunks(engine.step()) == [(urgent, 7, 9, True), (waiting, 0, 3, True)]
    engine.finish()


def test_a_step_packs_as_many_as_pack_budget_and_width_allow() -> None:
    for limit, expected in [
        ({"pack": 2}, [3, 3]),
        ({"slots": 3}, [3, 3, 3]),
        ({"budget": 11}, [3, 3, 3, 2]),
        ({"width": 5}, [3, 3, 3, 3, 3]),
        ({"pages": (3,)}, [3, 3, 3]),
    ]:
        engine = make(**limit)
        for token in range(6):
            engine.add([token] * 3)
        assert [chunk.end for chunk in engine.step().chunks] == expected
        engine.finish()


def test_a_chunk_is_cut_where_the_pages_in_sight_are_used_up() -> None:
    engine = make(width=5, pages=(64, 64), spans=(None, 4))
    one, two = engine.add([0] * 12), engine.add([1] * 20)
    assert chunks(engine.step()) == [(one, 0, 12, True), (two, 0, 8, False)]
    assert chunks(engine.step()) == [(two, 8, 20, True)]
    engine.finish()


def test_a_large_one_is_not_passed_by_small_ones() -> None:
    engine = make(pages=(6,))
    running = engine.add([0] * 8, 4)
    engine.step()
    large, small = engine.add([1] * 16, 4), engine.add([2])
    while running.status is not Status.FINISHED:
        assert not engine.step().chunks
    assert [chunk.sequence for chunk in engine.step().chunks] == [large, small]
    engine.finish()


def test_prefixes_are_found_and_counted() -> None:
    engine = make()
    prompt = list(range(9))
    first = engine.add(prompt, 8)
    engine.finish()
    assert first.cached == 0
    again, other, salted, fresh, more = (
        engine.add(prompt),
        engine.add([*prompt[:6], 0, 0]),
        engine.add(prompt, salt=b"s"),
        engine.add(prompt, reuse=False),
        engine.add([*first.tokens, 5]),  # what was written is found too
    )
    engine.finish()
    assert [s.cached for s in (again, other, salted, fresh, more)] == [8, 4, 0, 0, 16]
    assert engine.scheduler.prefix_queries == 9 + 9 + 8 + 9 + 18
    assert engine.scheduler.prefix_hits == 8 + 4 + 16


def test_a_token_is_always_left_to_compute() -> None:
    engine = make()
    engine.add(range(8))
    engine.finish()
    again = engine.add(range(8))
    assert chunks(engine.step()) == [(again, 4, 8, True)]
    engine.finish()


def test_a_window_needs_only_what_it_sees() -> None:
    engine = make(pages=(16, 4), spans=(None, 5), budget=4)
    first = engine.add(range(20), 4)
    for _ in range(5):
        engine.step()
    assert len(first.tables[1]) == 5
    assert [page >= 0 for page in first.tables[1]] == [False, False, False, True, True]
    again = engine.add([*range(18), 0])
    engine.finish()
    assert again.cached == 16
    early = engine.add([*range(6), 0])
    engine.finish()
    assert early.cached == 0  # taken by those that came later


def test_one_of_two_alike_waits_for_the_blocks_of_the_other_and_may_be_passed() -> None:
    engine = make()
    one, two = engine.add([1] * 10), engine.add([1] * 9)
    other = engine.add([2] * 10)
    assert chunks(engine.step()) == [(one, 0, 10, True), (other, 0, 10, True)]
    assert chunks(engine.step()) == [(two, 8, 9, True)]
    assert two.cached == 8
    engine.finish()


def test_none_waits_for_blocks_that_are_of_no_use_to_it() -> None:
    engine = make()
    one, two = engine.add([1] * 4), engine.add([1] * 4)  # a token must be left to compute
    assert chunks(engine.step()) == [(one, 0, 4, True), (two, 0, 4, True)]
    engine.finish()
    engine = make(snapshots=4)
    one, two = (
        engine.add([1] * 9),
        engine.add([1] * 4 + [2] * 5),
    )  # no state is kept where they part
    assert chunks(engine.step()) == [(one, 0, 8, False), (two, 0, 8, False)]
    engine.finish()


def test_the_end_of_a_chain_is_forgotten_before_its_beginning() -> None:
    engine = make(pages=(6,))
    engine.add(range(16))
    engine.finish()
    engine.add([9] * 14)
    engine.finish()
    again = engine.add(range(16))
    engine.finish()
    assert again.cached == 8


@given(limits(), st.integers(1, 40), st.integers(1, 9))
def test_most_pages_are_counted_right(limits: Limits, length: int, run: int) -> None:
    run, step = min(run, length), min(max(limits.budget, 2 * limits.lookahead + 1), length)

    def looked(group: int, start: int, run: int) -> int:
        return limits.blocks(start + run) - limits.first(group, start)

    for group in range(len(limits.pages)):
        starts = range(length - run + 1)
        seen = max(looked(group, start, run) for start in starts)
        assert seen <= limits.seen(group, length, run) <= max(seen, limits.blocks(length))
        if length >= limits.page + run + (limits.spans[group] or 0):
            assert seen == limits.seen(group, length, run)
        held = max(looked(group, start, step) for start in range(length - step + 1))
        assert held <= limits.held(group, length)


def test_a_step_of_many_tokens_ends_where_the_sequence_may() -> None:
    engine = make(pages=(3,), lookahead=4)
    for prompt in (5, 10):
        engine.add([1] * prompt, 12 - prompt)
        engine.finish()
    assert engine.scheduler.preemptions == 0


def test_after_a_restart_nothing_is_cached_and_all_is_done_again() -> None:
    engine = make(slots=2)
    sequences = [engine.add([token] * 9, 9) for token in range(3)]
    for _ in range(4):
        engine.step()
    engine.scheduler.restart()
    engine.device, engine.flying = Device(engine.limits), []
    assert (engine.scheduler.running, engine.scheduler.waiting) == (0, 3)
    assert [chunk.start for chunk in engine.step().chunks] == [0, 0]
    engine.finish()
    assert [s.reason for s in sequences] == ["length"] * 3
    engine = make(pages=(), spans=(), snapshots=4)
    for cached in (0, 8):
        engine.add(range(9))
        engine.finish()
        assert engine.ended[-1].cached == cached
    engine.scheduler.restart()
    engine.add(range(9))
    engine.finish()
    assert engine.ended[-1].cached == 0


def test_preemption_takes_the_last_in_order_and_loses_nothing() -> None:
    engine = make(pages=(6,), queue=3)
    first, last = engine.add([1] * 8, 12), engine.add([2] * 7, 12)
    engine.step()
    assert last.slot == 1
    while last.status is Status.RUNNING:
        engine.step()
    assert (last.slot, last.computed, last.tables) == (None, 0, [])
    assert last.written
    assert engine.scheduler.preemptions == 1
    assert engine.scheduler.waiting == 1
    while first.status is Status.RUNNING:
        engine.step()
    engine.finish()
    assert last.cached == 0


def test_what_cannot_be_taken_is_refused() -> None:
    engine = make(pages=(8,), queue=2)
    with pytest.raises(Unservable, match="prompt of 20 tokens with 13 to write takes 9 of 8 pages"):
        engine.scheduler.add(Sequence((0,) * 20, 13))
    with pytest.raises(Unservable, match="looks at 8 of 7 in prefill"):
        make(width=7).scheduler.add(Sequence((0,) * 20, 10))
    with pytest.raises(Unservable, match="prompt of 0 tokens"):
        engine.scheduler.add(Sequence((), 1))
    with pytest.raises(Unservable, match="0 to write"):
        engine.scheduler.add(Sequence((1,), 0))
    with pytest.raises(Unservable, match="a prefill of 3 tokens"):
        make(budget=3, snapshots=1)
    engine.add([0] * 20, 12)
    engine.add([0])
    with pytest.raises(QueueFull, match="2 requests wait already"):
        engine.scheduler.add(Sequence((1,), 1))
    engine.finish()


def test_cancelling_frees_at_once() -> None:
    engine = make(slots=2, budget=8)
    running, partly, waiting = (engine.add([token] * 9, 5) for token in range(3))
    engine.step()
    engine.step()
    for sequence in (running, partly, waiting):
        engine.scheduler.cancel(sequence)
        assert (sequence.reason, sequence.tables, sequence.slot) == ("cancelled", [], None)
    assert engine.scheduler.idle
    assert engine.scheduler.usage == 0
    engine.scheduler.cancel(running, "error")
    assert running.reason == "cancelled"
    never = Sequence((1,), 1)  # it was not added, perhaps since the queue was full
    engine.scheduler.cancel(never)
    assert never.status is Status.FINISHED
    engine.finish()


def test_recurrent_states_are_kept_at_the_last_boundary_and_found() -> None:
    engine = make(snapshots=2, budget=10)
    first = engine.add(range(19))
    assert chunks(engine.step()) == [(first, 0, 8, False)]
    assert chunks(engine.step()) == [(first, 8, 16, False)]
    assert chunks(engine.step()) == [(first, 16, 19, True)]
    engine.finish()
    again, shorter = engine.add(range(18)), engine.add([*range(14), 0])
    plan = engine.step()
    assert chunks(plan) == [(again, 16, 18, True), (shorter, 8, 12, False)]
    assert all(chunk.state is not None for chunk in plan.chunks)
    assert (plan.chunks[0].keep, plan.chunks[1].keep) == (None, shorter.keys[2])
    engine.finish()
    third, last = engine.add([*range(14), 1]), engine.add(range(18))
    assert chunks(engine.step())[0] == (third, 12, 15, True)
    engine.finish()
    assert last.cached == 12  # the state at 16 was used longest ago


def test_ends_of_recurrent_prompts_are_packed_with_beginnings() -> None:
    engine = make(snapshots=8)
    one, two = engine.add([1] * 9), engine.add([2] * 6)
    assert chunks(engine.step()) == [(one, 0, 8, False), (two, 0, 4, False)]
    three = engine.add([3] * 5)
    assert chunks(engine.step()) == [(one, 8, 9, True), (two, 4, 6, True), (three, 0, 4, False)]
    engine.finish()


@pytest.mark.parametrize("more", [{}, {"snapshots": 2}, {"lookahead": 4}], ids=str)
@pytest.mark.parametrize("spans", [(None,), (None, 6)], ids=str)
def test_nobody_starves_under_a_stream_of_urgent_ones(spans: Any, more: dict[str, int]) -> None:
    engine = make(slots=2, pages=(9,) * len(spans), spans=spans, budget=8, queue=8, **more)
    patient = engine.add([1] * 15, 8, priority=1)
    for step in itertools.count():
        while engine.scheduler.waiting < 4:
            engine.add([step % 3] * (step % 11 + 1), 6)
        engine.step()
        if patient.status is Status.FINISHED:
            break
        assert step < 64 * 8


@settings(deadline=None, max_examples=40)
@given(limits(), st.lists(REQUESTS, min_size=1, max_size=6), REQUESTS)
def test_each_ends_while_others_keep_arriving(
    limits: Limits, stream: list[dict[str, Any]], request: dict[str, Any]
) -> None:
    engine = Engine(limits)
    try:
        mine = engine.add(**request | {"priority": 0})
    except Unservable:
        return
    for step, other in enumerate(itertools.cycle(stream)):
        with contextlib.suppress(QueueFull, Unservable):
            engine.add(**other | {"priority": -(step % 2)})
        engine.step()
        if mine.status is Status.FINISHED:
            break
        assert step < 64 * 40
