import struct
from collections import OrderedDict
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.serve.pages import Pool, keys

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=20)


@given(TOKENS, st.integers(1, 5), st.integers(0, 20), st.binary(max_size=3))
def test_a_chain_goes_on_where_it_was_left(
    tokens: list[int], size: int, cut: int, salt: bytes
) -> None:
    whole = keys(tokens, size, salt)
    begun = keys(tokens[:cut], size, salt)
    rest = keys(tokens[len(begun) * size :], size, salt, begun[-1] if begun else None)
    assert len(whole) == len(tokens) // size
    assert begun + rest == whole


@given(TOKENS, TOKENS, st.integers(1, 3))
def test_a_key_stands_for_everything_before_its_end(a: list[int], b: list[int], size: int) -> None:
    for i, (one, other) in enumerate(zip(keys(a, size), keys(b, size), strict=False), 1):
        assert (one == other) == (a[: i * size] == b[: i * size])


def test_a_key_is_the_hash_of_the_key_before_and_int32() -> None:
    first = sha256(sha256(b"s").digest() + struct.pack("<2i", 7, 2**31 - 1)).digest()
    second = sha256(first + struct.pack("<2i", 0, 1)).digest()
    assert keys([7, 2**31 - 1, 0, 1, 5], 2, b"s") == [first, second]
    assert keys([7, 8], 2, b"s") != keys([7, 8], 2, b"t")


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=60))
def test_a_pool_does_what_a_plain_model_does(count: int, moves: list[tuple[int, int]]) -> None:
    pool = Pool(count)
    held: list[int] = []  # a page as often as it is held
    key_of: dict[int, bytes] = {}
    cached: OrderedDict[int, None] = OrderedDict()
    for move, number in moves:
        key = bytes([number])
        if move == 0 and pool.available:
            blank = len(set(held) | set(cached)) < count
            page = pool.take()
            assert page not in held
            if blank:
                assert page not in cached
            else:
                assert page == next(iter(cached))
                del cached[page], key_of[page]
            held.append(page)
        elif move == 1 and held:
            page = held.pop(number % len(held))
            pool.release(page)
            if page not in held and page in key_of:
                cached[page] = None
        elif move == 2 and held:
            page = held[number % len(held)]
            if page not in key_of:
                pool.publish(page, key)
                if key not in key_of.values():
                    key_of[page] = key
        elif move == 3 and (page := pool.find(key)) is not None:
            pool.retain(page)
            held.append(page)
            cached.pop(page, None)
        for known in range(6):
            pages = [page for page, key in key_of.items() if key == bytes([known])]
            assert pool.find(bytes([known])) == (pages[0] if pages else None)
        assert pool.used == len(set(held))
        assert pool.available == count - pool.used


def test_an_empty_pool_gives_nothing() -> None:
    pool = Pool(1)
    pool.take()
    with pytest.raises(KeyError):
        pool.take()
