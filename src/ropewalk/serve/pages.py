"""Pages of a cache: who holds which, and which hold blocks of tokens that can be found again. Knows
numbers and keys only; the arrays are elsewhere."""

import struct
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256


def keys(
    tokens: Sequence[int], size: int, salt: bytes = b"", after: bytes | None = None
) -> list[bytes]:
    """Keys of the full blocks of `size` tokens: SHA-256 of the key before and the block as int32.

    The chain begins from the salt, or goes on from the key `after`.
    """
    key = sha256(salt).digest() if after is None else after
    layout, chain = struct.Struct(f"<{size}i"), []
    for start in range(0, len(tokens) - size + 1, size):
        key = sha256(key + layout.pack(*tokens[start : start + size])).digest()
        chain.append(key)
    return chain


def first_block(span: int | None, position: int, size: int) -> int:
    """The first block of `size` tokens that a query at `position` sees, of its last `span` keys or
    of all."""
    return 0 if span is None else max(position - span + 1, 0) // size


def seen_blocks(span: int | None, length: int, run: int, size: int) -> int:
    """Most blocks of `size` tokens that `run` queries in a row see together, in a sequence of
    `length`; each sees its last `span` keys, or all."""
    whole = -(-length // size)
    return whole if span is None else min(whole, -(-(span + run - 2) // size) + 1)


class Pool:
    """The pages 0 to count - 1 of one group, each held by any number of sequences or none.

    A page that nobody holds keeps its key, and can be found by it, until it is taken again.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._holders = [0] * count
        self._key = [b""] * count  # empty: none
        self._page: dict[bytes, int] = {}
        self._blank = list(range(count - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the first was let go longest ago

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._blank) + len(self._cached)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.count - self.available

    def take(self) -> int:
        """A page without a key, or the one that was let go longest ago, which loses its key.

        Raises KeyError when none is available.
        """
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            del self._page[self._key[page]]
            self._key[page] = b""
        self._holders[page] = 1
        return page

    def retain(self, page: int) -> None:
        """One more holds the page, which is held or has a key."""
        if not self._holders[page]:
            del self._cached[page]
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One less holds the page."""
        self._holders[page] -= 1
        if not self._holders[page]:
            if self._key[page]:
                self._cached[page] = None
            else:
                self._blank.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """Makes a held page findable by `key`, unless another page already is."""
        if key not in self._page:
            self._page[key] = page
            self._key[page] = key

    def find(self, key: bytes) -> int | None:
        """The page that was published with `key`, if it is still there."""
        return self._page.get(key)
