"""The thread that serves: it takes requests in, plans steps, sends them to the device one step
ahead of what it knows, and hands out what was written. Knows nothing of HTTP or text."""

import asyncio
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from ropewalk.core.errors import UserError
from ropewalk.core.log import log
from ropewalk.serve.engine import Engine, Prefix, Row
from ropewalk.serve.grammar import Matcher
from ropewalk.serve.metrics import Metrics
from ropewalk.serve.packed import Segment
from ropewalk.serve.request import Sequence as Served
from ropewalk.serve.request import Status
from ropewalk.serve.scheduler import Chunk, Limits, Plan, QueueFull, Scheduler
from ropewalk.serve.slots import Chosen, Settings

# Steps of a profile.
_TRACED = 100
# Failed steps that a sequence may be part of beside others; one more ends it.
_TRIES = 3


class Token(NamedTuple):
    """A token that was written or read, its natural log-probability, and the most likely ones."""

    id: int
    logprob: float
    ranked: tuple[tuple[int, float], ...] = ()


class Ended(NamedTuple):
    """The last event of a job."""

    reason: str
    """stop, length, cancelled or error"""
    error: str | None = None


class Pooled(NamedTuple):
    """What an embedding is made of."""

    hidden: np.ndarray
    """float32 [d]"""


class Read(NamedTuple):
    """The prompt's tokens with their scores; the first has none."""

    tokens: list[Token]


Event = list[Token] | Read | Pooled | Ended


@dataclasses.dataclass(eq=False)
class Job:
    """One sequence to be served, and where its events go."""

    prompt: tuple[int, ...]
    settings: Settings
    index: int
    """which answer of its request it is"""
    events: asyncio.Queue[tuple[int, Event]]
    priority: int = 0
    salt: bytes = b""
    matcher: Matcher | None = None
    scored: bool = False
    """whether the prompt's tokens are to be scored"""
    pooled: Literal["mean", "last"] | None = None
    """with one: nothing is written, and hidden states are handed out"""
    arrived: float = dataclasses.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.sequence = Served(
            self.prompt,
            self.settings.limit,
            frozenset(self.settings.stops),
            self.priority,
            self.salt,
            self,
            reuse=not (self.scored or self.pooled),
        )
        self.scores: list[Token] = []
        self.sum: Any = 0.0
        self.carry: Any = None
        self.began = self.first = self.last = 0.0
        self.failures = 0


class Service:
    """A running engine. `submit` and `cancel` are called from the event loop's thread."""

    def __init__(self, engine: Engine, queued: int, metrics: Metrics, trace: Path | None = None):
        """`queued`: sequences that may wait; `trace`: where a profile of the first steps goes."""
        sizes = engine.sizes
        self.engine, self.metrics = engine, metrics
        self.limits = Limits(
            sizes.slots, sizes.page, sizes.pages, engine.spans, sizes.chunk, sizes.pack,
            engine.width, queued + sizes.slots, sizes.lookahead,
            snapshots=4 * sizes.slots if engine.recurrent else 0,
        )  # fmt: skip
        self.scheduler = Scheduler(self.limits)
        self.open, self._until = 0, 0.0
        # The first request does not wait for it.
        self._state: Any = jax.block_until_ready(engine.init_decode_state())
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._outbox: list[tuple[Job, Event]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self._trace, self._steps = trace, 0
        self._live: set[Job] = set()
        self._suspects: list[Job] = []

    @property
    def alive(self) -> bool:
        """Whether there is a thread that serves, and the device keeps a state for it."""
        return self._thread.is_alive() and self._state is not None

    def start(self) -> None:
        """Begins to serve; events are put by the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes jobs in, all or none. Raises QueueFull."""
        most = self.limits.queue  # of those that wait and those that run
        if self.open + len(jobs) > most:
            raise QueueFull(
                f"{self.open} sequences are being served or wait, and {len(jobs)} more are asked "
                f"for; {most} may: try again later"
            )
        self.open += len(jobs)
        for job in jobs:
            self._inbox.put(("add", job))

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Ends jobs that nobody waits for; those that ended are left as they are."""
        for job in jobs:
            self._inbox.put(("cancel", job))

    async def drain(self, timeout_s: float) -> None:
        """Waits until nothing is served any more, and ends what is left when the time is over; who
        calls again sets another time."""
        self._until = time.monotonic() + timeout_s
        while self.open and time.monotonic() < self._until:
            await asyncio.sleep(0.02)
        self._inbox.put(("end", None))

    def stop(self) -> None:
        """Ends the thread."""
        self._inbox.put(("stop", None))
        self._thread.join(timeout=30)

    # The engine's thread.

    def _run(self) -> None:
        flight: _Flight | None = None
        while not self._stopping:
            try:
                self._take_in(wait=flight is None and self.scheduler.idle)
                if self._state is None:
                    self._state = self.engine.init_decode_state()
                if self._suspects or any(job.matcher for job in self._live):
                    flight = self._land(flight)
                started = time.perf_counter()
                plan = self.scheduler.plan(self._suspect())
                sent = self._send(plan) if plan.chunks or plan.rows else None
                if sent is None:  # a suspect that finds no room waits for the others as usual
                    self._suspects.clear()
                self._profile(sent is not None)
                flight, landing = sent, flight
                self._land(landing)
                took = time.perf_counter() - started
                self.metrics.step(self.scheduler, plan, self.engine.programs(), took)
            except Exception:
                log.exception("a step failed; the device's state is made anew")
                flight = None
                self._recover()
            self._hand_out()

    def _profile(self, sent: bool) -> None:
        """A profile of the first steps, where one is asked for."""
        if self._trace is None or not sent:
            return
        try:
            if self._steps == 0:
                jax.profiler.start_trace(str(self._trace))
            self._steps += 1
            if self._steps > _TRACED:
                jax.profiler.stop_trace()
                log.info("%s: a profile of %d steps", self._trace, _TRACED)
                self._trace = None
        except Exception:
            log.exception("%s: no profile is made", self._trace)
            self._trace = None

    def _take_in(self, wait: bool) -> None:
        while wait or not self._inbox.empty():
            what, job = self._inbox.get()
            wait = False
            if what == "stop":
                self._stopping = True
            elif what == "cancel":
                self._end(job, "cancelled")
            elif what == "end":
                for left in list(self._live):
                    self._end(left, "error", "the server is shutting down")
            else:
                self._live.add(job)
                self._guarded(job, self.scheduler.add, job.sequence)

    def _send(self, plan: Plan) -> "_Flight":
        """Dispatches a step; nothing of it is waited for."""
        now, flight = time.monotonic(), _Flight()
        if plan.chunks:
            flight.chunks = plan.chunks
            flight.prefix = self._prefill(plan.chunks, now)
            last = [c for c in plan.chunks if c.last and not c.sequence.payload.pooled]
            sequences, bits = self._allowed([chunk.sequence for chunk in last])
            flight.begun = [chunk for chunk in last if chunk.sequence in sequences]
            if flight.begun:
                flight.first = self._insert(plan.chunks, flight.begun, flight.prefix, bits)
        rows, bits = self._allowed(plan.rows)
        if rows:
            each = [Row(_slot(s), s.tables) for s in rows]
            self._state, flight.next = self.engine.generate(self._state, each, bits)
            flight.rows = rows
        return flight

    def _prefill(self, chunks: Sequence[Chunk], now: float) -> Prefix:
        segments, scored = [], False
        for chunk in chunks:
            sequence, job = chunk.sequence, chunk.sequence.payload
            job.began = job.began or now
            scored |= job.scored
            carry = job.carry if chunk.state is None and chunk.start else chunk.state
            tokens = sequence.between(chunk.start, chunk.end)
            after = sequence.between(chunk.end, chunk.end + 1)
            following = after[0] if after else 0
            segments.append(Segment(tokens, chunk.start, sequence.tables, carry, following))
        self._state, prefix = self.engine.prefill(self._state, segments, scored)
        for chunk, carry in zip(chunks, prefix.carries, strict=True):
            chunk.sequence.payload.carry = None if chunk.last else carry
            if chunk.keep is not None:
                self.scheduler.keep(chunk.keep, carry)
        return prefix

    def _insert(
        self, chunks: list[Chunk], begun: list[Chunk], prefix: Prefix, bits: np.ndarray | None
    ) -> Chosen:
        places = []
        for chunk in begun:
            sequence, settings = chunk.sequence, chunk.sequence.payload.settings
            slot = _slot(sequence)
            if settings.penalized or self.engine.sizes.drafts:
                self._state = self.engine.tell(self._state, slot, sequence.prompt, sequence.written)
            settings = dataclasses.replace(settings, written=len(sequence.written))
            places.append((chunks.index(chunk), slot, settings))
        self._state, chosen = self.engine.insert(self._state, prefix, places, bits)
        return chosen

    def _allowed(self, sequences: list[Served]) -> tuple[list[Served], np.ndarray | None]:
        """Which sequences go on, and what their grammars allow next, uint32 [b, words], if any has
        one. One whose grammar fails ends."""
        if not any(sequence.payload.matcher for sequence in sequences):
            return sequences, None
        bits = np.full((len(sequences), -(-self.engine.vocab // 32)), 2**32 - 1, np.uint32)
        for row, sequence in zip(bits, sequences, strict=True):
            job: Job = sequence.payload
            if job.matcher is not None:
                self._guarded(job, job.matcher.mask, row)
        on = [i for i, one in enumerate(sequences) if one.status is not Status.FINISHED]
        return [sequences[i] for i in on], bits[on]

    def _guarded(self, job: Job, call: Callable[..., Any], *arguments: Any) -> None:
        """A call that concerns one job alone, and if it fails ends that one alone."""
        try:
            call(*arguments)
        except Exception as error:
            told = str(error) if isinstance(error, UserError) else "the request failed"
            log.warning("a request failed: %s", error)
            self._end(job, "error", told)

    def _land(self, flight: "_Flight | None") -> None:
        """Waits for a step that was sent, and hands its tokens to their sequences."""
        if flight is None:
            return
        first, after, prefix = jax.device_get((flight.first, flight.next, _told(flight)))
        now, at = time.monotonic(), 0
        for number, chunk in enumerate(flight.chunks):
            job, read = chunk.sequence.payload, slice(at, at + chunk.end - chunk.start)
            at = read.stop
            if prefix is not None:
                self._read(job, chunk, number, read, prefix)
        for i, chunk in enumerate(flight.begun):
            self._commit(chunk.sequence, [_token(first, (i,), chunk.sequence)], now)
        if flight.rows and self.engine.sizes.drafts:
            self.metrics.drafted.inc(int(after.guessed.sum()))
            self.metrics.accepted.inc(int((after.guessed & after.emitted).sum()))
        for i, sequence in enumerate(flight.rows):
            steps = range(after.token.shape[0])
            tokens = [_token(after, (k, i), sequence) for k in steps if after.emitted[k, i]]
            self._commit(sequence, tokens, now)
        wrote = [sequence.payload for sequence in flight.rows]
        self._suspects = [job for job in self._suspects if job not in wrote]

    def _read(self, job: Job, chunk: Chunk, number: int, read: slice, prefix: Any) -> None:
        """What a chunk's tokens are scored, and what they add to an embedding."""
        hidden, sums, scores = prefix
        if chunk.start == 0:  # for the first time, or once more after it lost its pages
            job.scores, job.sum = [], 0.0
        if job.pooled:
            job.sum = job.sum + sums[number]
            if chunk.last and chunk.sequence.status is not Status.FINISHED:
                mean = job.sum / len(job.prompt)
                last = np.asarray(hidden[number], np.float32)
                self._emit(job, Pooled(mean if job.pooled == "mean" else last))
                self._end(job, "stop")
        if job.scored and scores is not None:
            logprobs, which, told = (x[read] for x in scores)
            after = chunk.sequence.between(chunk.start + 1, chunk.end + 1)
            for i, token in enumerate(after):
                ranked = tuple(zip(which[i].tolist(), told[i].tolist(), strict=True))
                job.scores.append(Token(token, float(logprobs[i]), ranked))
            if chunk.last:
                first, job.scored = Token(job.prompt[0], 0.0), False
                self._emit(job, Read([first, *job.scores]))

    def _commit(self, sequence: Served, tokens: list[Token], now: float) -> None:
        job: Job = sequence.payload
        if sequence.status is Status.FINISHED:
            return
        before = len(sequence.written)
        self.scheduler.commit(sequence, [token.id for token in tokens])
        tokens = tokens[: len(sequence.written) - before]
        if job.matcher is not None:
            for token in tokens:
                self._guarded(job, job.matcher.accept, token.id)
        if tokens:
            self._emit(job, tokens)
            self.metrics.wrote(job, len(tokens), now)
        if sequence.status is Status.FINISHED and sequence.reason in ("stop", "length"):
            self._emit(job, Ended(sequence.reason))

    def _end(self, job: Job, reason: str, error: str | None = None) -> None:
        if job.sequence.status is not Status.FINISHED:
            self.scheduler.cancel(job.sequence, reason)
            self._emit(job, Ended(reason, error))

    def _emit(self, job: Job, event: Event) -> None:
        if isinstance(event, Ended):
            self._live.discard(job)
            self.metrics.ended(job, event.reason)
        self._outbox.append((job, event))

    def _hand_out(self) -> None:
        """One call into the event loop a step, whatever was written."""
        if self._outbox and self._loop is not None and not self._loop.is_closed():
            outbox, self._outbox = self._outbox, []
            self._loop.call_soon_threadsafe(self._put, outbox)

    def _put(self, outbox: list[tuple[Job, Event]]) -> None:
        for job, event in outbox:
            job.events.put_nowait((job.index, event))
            self.open -= isinstance(event, Ended)

    def _suspect(self) -> Served | None:
        """After a failed step, the first of its sequences that did not write a token since: it runs
        apart from all others, to tell whose fault it was."""
        self._suspects = [job for job in self._suspects if job in self._live]
        return self._suspects[0].sequence if self._suspects else None

    def _recover(self) -> None:
        """Begins anew on the device. What was being served is read again, one sequence at a time;
        one that fails apart from others, or too often beside them, ends."""
        apart = self._suspect()
        for job in list(self._live):
            if self._state is None or job.sequence is apart or job.failures >= _TRIES:
                self._end(job, "error", "the engine failed; the request may be sent again")
            elif apart is None and job.sequence.slot is not None:
                job.failures += 1
                self._suspects.append(job)
        self.scheduler.restart()
        self._state = None  # before the next one is made: there may be no room for both


@dataclasses.dataclass
class _Flight:
    """A step on its way: what was sent, and its results, not waited for."""

    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    begun: list[Chunk] = dataclasses.field(default_factory=list)
    rows: list[Served] = dataclasses.field(default_factory=list)
    prefix: Prefix | None = None
    first: Any = None
    next: Any = None


def _slot(sequence: Served) -> int:
    if sequence.slot is None:
        raise RuntimeError("a sequence without a slot was planned")
    return sequence.slot


def _told(flight: _Flight) -> Any:
    """Of a prefill, what somebody waits for."""
    prefix, jobs = flight.prefix, [chunk.sequence.payload for chunk in flight.chunks]
    if prefix is None or not any(job.scored or job.pooled for job in jobs):
        return None
    return prefix.hidden, prefix.sums, prefix.scores


def _token(chosen: Chosen, at: tuple[int, ...], sequence: Served) -> Token:
    ranked = ()
    if sequence.payload.settings.ranked:
        best = chosen.ranked[at].tolist(), chosen.ranked_logprob[at].tolist()
        ranked = tuple(zip(*best, strict=True))
    return Token(int(chosen.token[at]), float(chosen.logprob[at]), ranked)
