"""A sequence that is being served: what was asked, and how far it is. Knows neither how tokens are
sampled nor what becomes of them."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """Where a sequence stands."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and what is written after it; only the scheduler changes its state.

    Asked: `max_tokens` to write at most, the ids in `stops` end it, lower `priority` is sooner,
    cached blocks are shared among equal `salt` only, `reuse=False` never reads cached blocks,
    `payload` is the server's own.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    stops: frozenset[int] = frozenset()
    priority: int = 0
    salt: bytes = b""
    payload: Any = None
    reuse: bool = True

    written: list[int] = field(default_factory=list, init=False)
    # Tokens whose keys the dispatched programs have surely written.
    computed: int = field(default=0, init=False)
    slot: int | None = field(default=None, init=False)
    # By group, the page of each block; -1 where it was given back.
    tables: list[list[int]] = field(default_factory=list, init=False)
    status: Status = field(default=Status.WAITING, init=False)
    reason: str | None = field(default=None, init=False)
    # Tokens of the prompt that lay in cached pages at the first admission.
    cached: int = field(default=0, init=False)

    # The scheduler's own: place in the order, keys of full blocks, how many of them are published,
    # most tokens of each step under way, and whether it was ever admitted.
    order: tuple[int, int] = field(default=(0, 0), init=False)
    keys: list[bytes] = field(default_factory=list, init=False)
    published: int = field(default=0, init=False)
    flights: list[int] = field(default_factory=list, init=False)
    admitted: bool = field(default=False, init=False)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt and what is written."""
        return (*self.prompt, *self.written)

    @property
    def length(self) -> int:
        """How many tokens are known."""
        return len(self.prompt) + len(self.written)

    @property
    def longest(self) -> int:
        """How many tokens there may be at most."""
        return len(self.prompt) + self.max_tokens

    @property
    def ahead(self) -> int:
        """Most tokens that dispatched steps, not yet committed, may add."""
        return sum(self.flights)

    def between(self, start: int, end: int) -> tuple[int, ...]:
        """`tokens[start:end]`, without making all of `tokens`."""
        prompt = len(self.prompt)
        written = self.written[max(start - prompt, 0) : max(end - prompt, 0)]
        return (*self.prompt[start:end], *written)
