"""Which sequences take part in the next step, and which pages they use: continuous batching over
paged caches. Plain bookkeeping: it knows no arrays, no device and no clock.

The order of sequences is their number of arrival + 64 for every step of priority, so that each is
passed by finitely many. A step may be planned before the tokens of the step before it are known.
"""

import heapq
from bisect import insort
from collections import OrderedDict
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from ropewalk.core.errors import UserError
from ropewalk.serve.pages import Pool, first_block, keys, seen_blocks
from ropewalk.serve.request import Sequence, Status

PRIORITY = 64
_order = attrgetter("order")


class QueueFull(UserError):
    """As many sequences wait as may."""


class Unservable(UserError):
    """A sequence that could never run, or limits under which none could."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device has room for.

    slots: sequences that run at a time. page: tokens of a page. pages: of each group of layers.
    spans: of each group, how many of the last keys a query sees (its own included), None for all.
    budget: tokens of one step's prefill. pack: sequences in it. width: pages of a group that its
    chunks look at, taken together. queue: waiting sequences. lookahead: most tokens that a decode
    step adds to a sequence. snapshots: states of recurrent layers that are kept, 0 without such.
    """

    slots: int
    page: int
    pages: tuple[int, ...]
    spans: tuple[int | None, ...]
    budget: int
    pack: int
    width: int
    queue: int
    lookahead: int = 1
    snapshots: int = 0

    def first(self, group: int, position: int) -> int:
        """The first block that a query at `position` sees in a group."""
        return first_block(self.spans[group], position, self.page)

    def blocks(self, length: int) -> int:
        """Blocks that `length` tokens fill, the last one perhaps in part."""
        return -(-length // self.page)

    def seen(self, group: int, length: int, run: int) -> int:
        """Most pages of a group that `run` queries in a row, in a sequence of `length`, look at."""
        return seen_blocks(self.spans[group], length, run, self.page)

    def held(self, group: int, length: int) -> int:
        """Most pages of a group that a sequence of up to `length` tokens holds at a time."""
        return self.seen(group, length, max(self.budget, 2 * self.lookahead + 1))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of a sequence to prefill.

    last: they are its last, and the next token is sampled. state: the kept state of recurrent
    layers to begin from; None begins from nothing at 0, and elsewhere from the sequence's own last
    chunk. keep: the key to hand the state at `end` back under, with `Scheduler.keep`.
    """

    sequence: Sequence
    start: int
    end: int
    last: bool
    state: Any = None
    keep: bytes | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: the chunks of a packed prefill, and the sequences that decode."""

    chunks: list[Chunk] = field(default_factory=list)
    rows: list[Sequence] = field(default_factory=list)


@dataclass(slots=True)
class _Room:
    """What is left of one step's prefill, and the keys of the blocks that it computes."""

    budget: int
    pack: int
    widths: list[int]
    promised: set[bytes] = field(default_factory=set)


class Scheduler:
    """Sequences that wait or run, and the pages that they share."""

    def __init__(self, limits: Limits) -> None:
        if limits.snapshots and limits.budget < limits.page:
            raise Unservable(
                f"a prefill of {limits.budget} tokens a step never reaches the end of a page of"
                f" {limits.page}, where states of recurrent layers are kept; raise the budget"
            )
        self.limits = limits
        self.pools = tuple(Pool(count) for count in limits.pages)
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._slots = list(range(limits.slots))
        self._waiting: list[Sequence] = []  # this and the next in order
        self._active: list[Sequence] = []
        self._states: OrderedDict[bytes, Any] = OrderedDict()
        self._arrivals = 0
        self._windows = [g for g, span in enumerate(limits.spans) if span is not None]

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences with a slot."""
        return len(self._active)

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self._waiting and not self._active

    @property
    def usage(self) -> float:
        """The part of all pages that sequences hold."""
        return sum(pool.used for pool in self.pools) / max(sum(self.limits.pages), 1)

    def add(self, sequence: Sequence) -> None:
        """Takes a new sequence in.

        Raises QueueFull, and Unservable for one that even alone would lack pages.
        """
        if len(self._waiting) >= self.limits.queue:
            raise QueueFull(
                f"{len(self._waiting)} requests wait already, as many as may; try again later"
            )
        self._check(sequence)
        sequence.order = self._arrivals + PRIORITY * sequence.priority, self._arrivals
        self._arrivals += 1
        insort(self._waiting, sequence, key=_order)

    def cancel(self, sequence: Sequence, reason: str = "cancelled") -> None:
        """Ends a sequence for `reason` and frees all that it holds; nothing if it ended before."""
        if sequence.status is not Status.FINISHED:
            self._leave(sequence)
            sequence.status, sequence.reason = Status.FINISHED, reason

    def plan(self, only: Sequence | None = None) -> Plan:
        """The next step. The tables of its sequences hold for it until the next call, except that a
        commit or cancel that ends a sequence replaces its tables by none.

        `only` after a restart: a step of one sequence, committed before the next is planned.
        """
        limits, plan = self.limits, Plan()
        room = _Room(limits.budget, limits.pack, [limits.width] * len(self.pools))
        for sequence in self._active:
            self._give_back(sequence)
        for sequence in list(self._active):
            if only not in (None, sequence):
                continue
            if sequence.status is Status.PREFILLING:
                end = self._reach(room, sequence, sequence.computed)
                if end > sequence.computed and self._grow(sequence, end):
                    self._add_chunk(plan, room, sequence, end)
            elif sequence.status is Status.RUNNING:  # else one before it took its pages
                so_far = sequence.length + sequence.ahead
                if so_far < sequence.longest and self._grow(sequence, so_far + limits.lookahead):
                    plan.rows.append(sequence)
                    sequence.flights.append(limits.lookahead)
        waiting = self._waiting if only is None else [s for s in self._waiting if s is only]
        self._admit(plan, room, waiting)
        for chunk in plan.chunks:
            self._publish(chunk.sequence)
        return plan

    def commit(self, sequence: Sequence, tokens: list[int]) -> None:
        """Takes what the oldest uncommitted step sampled for a sequence: that of its last chunk or
        of a row. What comes after its end is ignored."""
        if sequence.status is Status.FINISHED:
            return
        sequence.flights.pop(0)
        reason = None
        for token in tokens:
            sequence.written.append(token)
            if token in sequence.stops:
                reason = "stop"
            elif len(sequence.written) == sequence.max_tokens:
                reason = "length"
            if reason:
                break
        if sequence.status is Status.RUNNING:
            sequence.computed = sequence.length - 1
            self._publish(sequence)
        if reason:
            self.cancel(sequence, reason)

    def keep(self, key: bytes, state: Any) -> None:
        """Keeps the state of recurrent layers that a chunk's `keep` asked for."""
        self._states[key] = state
        self._states.move_to_end(key)
        if len(self._states) > self.limits.snapshots:
            self._states.popitem(last=False)

    def restart(self) -> None:
        """Begins anew, after the device lost everything: what ran waits again, nothing is cached
        any more, and steps under way are never committed."""
        for sequence in list(self._active):
            self._set_back(sequence)
        for sequence in self._waiting:
            sequence.flights.clear()
        self.pools = tuple(Pool(count) for count in self.limits.pages)
        self._states.clear()

    def _check(self, sequence: Sequence) -> None:
        limits, prompt = self.limits, len(sequence.prompt)
        if not prompt or sequence.max_tokens < 1:
            raise Unservable(
                f"a prompt of {prompt} tokens with {sequence.max_tokens} to write; both must be at"
                " least 1"
            )
        least = limits.page if limits.snapshots else 1
        for group, pages in enumerate(limits.pages):
            held = limits.held(group, sequence.longest)
            seen = limits.seen(group, sequence.longest - 1, least)
            if held > pages or seen > limits.width:
                raise Unservable(
                    f"a prompt of {prompt} tokens with {sequence.max_tokens} to write takes {held}"
                    f" of {pages} pages of {limits.page} tokens (group {group}) and looks at"
                    f" {seen} of {limits.width} in prefill; shorten it, or serve with more pages"
                )

    def _admit(self, plan: Plan, room: _Room, waiting: list[Sequence]) -> None:
        """Gives slots and pages to those that wait, in order, until one lacks something."""
        limits = self.limits
        # No more are looked at, since many that wait for the same blocks would take long.
        for sequence in waiting[: 2 * limits.pack]:
            if not self._slots or sequence.flights:
                return
            self._hash(sequence)
            matched = self._match(sequence) if sequence.reuse else 0
            most = (sequence.length - 1) // limits.page
            if sequence.reuse and not room.promised.isdisjoint(sequence.keys[matched:most]):
                continue
            end = self._reach(room, sequence, matched * limits.page)
            if end == matched * limits.page or not self._share(sequence, matched):
                return
            self._enter(sequence, matched)
            self._grow(sequence, end)
            state = None
            if limits.snapshots and matched:
                state = self._states[sequence.keys[matched - 1]]
                self._states.move_to_end(sequence.keys[matched - 1])
            self._add_chunk(plan, room, sequence, end, state)

    def _reach(self, room: _Room, sequence: Sequence, start: int) -> int:
        """Where a chunk from `start` on ends; at `start` when there is no room for one."""
        limits, goal = self.limits, sequence.length
        if limits.snapshots and start < goal // limits.page * limits.page:
            goal = goal // limits.page * limits.page
        end = min(goal, start + room.budget) if room.pack else start
        for group, width in enumerate(room.widths):
            end = min(end, (limits.first(group, start) + width) * limits.page)
        if limits.snapshots and end < goal:
            end = end // limits.page * limits.page
        return max(end, start)

    def _add_chunk(
        self, plan: Plan, room: _Room, sequence: Sequence, end: int, state: Any = None
    ) -> None:
        limits, start = self.limits, sequence.computed
        full = sequence.keys[start // limits.page : end // limits.page]
        keep = full[-1] if limits.snapshots and end % limits.page == 0 else None
        last = end == sequence.length
        plan.chunks.append(Chunk(sequence, start, end, last, state, keep))
        room.budget -= end - start
        room.pack -= 1
        for group in range(len(room.widths)):
            room.widths[group] -= limits.blocks(end) - limits.first(group, start)
        # Without its state a block of recurrent layers is of no use.
        room.promised.update(full if not limits.snapshots else [keep] if keep else [])
        sequence.computed = end
        if last:
            sequence.status = Status.RUNNING
            sequence.flights.append(1)

    def _match(self, sequence: Sequence) -> int:
        """The longest run of cached blocks that a sequence can begin from: what its next query sees
        is there in every group, and at least one token is left to compute."""
        limits, chain = self.limits, sequence.keys
        most = (sequence.length - 1) // limits.page
        for span, pool in zip(limits.spans, self.pools, strict=True):
            if span is None:
                most = next((i for i in range(most) if pool.find(chain[i]) is None), most)
        while most:
            if limits.snapshots and chain[most - 1] not in self._states:
                most -= 1
                continue
            holes = (
                block
                for g in self._windows
                for block in range(most - 1, limits.first(g, most * limits.page) - 1, -1)
                if self.pools[g].find(chain[block]) is None
            )
            hole = next(holes, None)
            if hole is None:
                break
            most = hole  # any more would see it too
        return most

    def _share(self, sequence: Sequence, matched: int) -> bool:
        """Makes tables of the matched blocks, if then the whole sequence would find pages."""
        limits, fits = self.limits, True
        for group, pool in enumerate(self.pools):
            first = limits.first(group, matched * limits.page)
            found = (pool.find(key) for key in sequence.keys[first:matched])
            shared = [page for page in found if page is not None]
            for page in shared:
                pool.retain(page)
            sequence.tables.append([-1] * first + shared)
            length = min(sequence.length + limits.lookahead, sequence.longest)
            held = limits.held(group, length)
            fits = fits and held - len(shared) <= pool.available
        if not fits:
            self._release(sequence)
        return fits

    def _enter(self, sequence: Sequence, matched: int) -> None:
        self._waiting.remove(sequence)
        insort(self._active, sequence, key=_order)
        sequence.status = Status.PREFILLING
        sequence.slot = heapq.heappop(self._slots)
        sequence.published = matched
        sequence.computed = matched * self.limits.page
        if not sequence.admitted:
            sequence.admitted = True
            sequence.cached = sequence.computed
            self.prefix_queries += len(sequence.prompt) if sequence.reuse else 0
            self.prefix_hits += sequence.cached

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Adds pages until the tables hold `length` tokens, at the cost of those last in order;
        False when that was the sequence itself."""
        blocks = self.limits.blocks(min(length, sequence.longest))
        for table, pool in zip(sequence.tables, self.pools, strict=True):
            while len(table) < blocks:
                while not pool.available:
                    last = self._active[-1]
                    self._set_back(last)
                    self.preemptions += 1
                    if last is sequence:
                        return False
                table.append(pool.take())
        return True

    def _give_back(self, sequence: Sequence) -> None:
        """Releases the pages that no query to come sees."""
        for group in self._windows:
            table = sequence.tables[group]
            block = self.limits.first(group, sequence.computed) - 1
            while block >= 0 and table[block] >= 0:
                self.pools[group].release(table[block])
                table[block] = -1
                block -= 1

    def _publish(self, sequence: Sequence) -> None:
        full = sequence.computed // self.limits.page
        if full > sequence.published:
            self._hash(sequence)
            for table, pool in zip(sequence.tables, self.pools, strict=True):
                for block in range(sequence.published, full):
                    pool.publish(table[block], sequence.keys[block])
            sequence.published = full

    def _hash(self, sequence: Sequence) -> None:
        """Adds the keys of the full blocks that have none yet."""
        page, chain = self.limits.page, sequence.keys
        if sequence.length // page > len(chain):
            tokens = sequence.between(len(chain) * page, sequence.length)
            chain += keys(tokens, page, sequence.salt, chain[-1] if chain else None)

    def _set_back(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.status = Status.WAITING
        insort(self._waiting, sequence, key=_order)

    def _leave(self, sequence: Sequence) -> None:
        """Takes a sequence out of its list, its slot and its pages."""
        members = self._waiting if sequence.status is Status.WAITING else self._active
        if sequence in members:
            members.remove(sequence)
        if sequence.slot is not None:
            heapq.heappush(self._slots, sequence.slot)
            sequence.slot = None
        self._release(sequence)
        sequence.computed = 0

    def _release(self, sequence: Sequence) -> None:
        for table, pool in zip(sequence.tables, self.pools, strict=False):
            for page in reversed(table):  # the end of a chain is of no use without its beginning
                if page >= 0:
                    pool.release(page)
        sequence.tables = []
