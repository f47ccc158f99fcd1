"""Whatever is asked, the server says what is wrong with it, at once, and goes on as before.

While every family of cases is sent, neighbours stream greedy answers that must not change.
"""

import asyncio
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import hypothesis
import pytest
import schemathesis
from fastapi.routing import APIRoute
from schemathesis.checks import not_a_server_error

from ropewalk.serve import chat, wire
from ropewalk.serve.door import Door
from ropewalk.serve.openai import Server
from ropewalk.text.tokenizer import byte_tokenizer
from tests.serve import bad_chats, bad_inputs, odd_inputs
from tests.serve.asking import ask, faults, neighbours
from tests.serve.bad_inputs import CHAT, TOKENIZE, WHOLE, Case
from tests.serve.test_wire import listening
from tests.serve.tiny_server import tiny_model

Family = Callable[[], Iterable[Case]]
FAMILIES: tuple[Family, ...] = (
    bad_inputs.wrong_types, bad_inputs.bounds, bad_inputs.ids, bad_inputs.prompts,
    bad_inputs.millions, bad_inputs.models, bad_inputs.texts, bad_chats.messages,
    bad_chats.structured, bad_chats.tools, odd_inputs.tolerated,
)  # fmt: skip
KEY = "sk-right-1234567890"


@pytest.fixture(scope="module")
def place(address: str) -> str:
    """The address, once it is listened at."""
    until(lambda: _listens(address))
    return address


def _listens(address: str) -> bool:
    try:
        return ask(address, Case("/health", None, None, (200,), "GET")).status == 200
    except ConnectionRefusedError:
        return False


def routes(server: Server) -> dict[str, set[str]]:
    """Addresses that are served, and the methods of each."""
    found: dict[str, set[str]] = {}
    for route in server.app._app.routes:
        path = re.sub(r"\{.*\}", "tiny", route.path)
        found.setdefault(path, set()).update(route.methods)
    return found


def programs(server: Server) -> int:
    engine = server.host.service.engine
    made = engine._init, engine._prefill, engine._insert, engine._generate, engine._count
    return sum(one._cache_size() for one in made)


def settled(server: Server) -> bool:
    """Whether nothing is served and nothing is held."""
    service = server.host.service
    scheduler = service.scheduler
    return not (service.open or scheduler.running or scheduler.waiting or scheduler.usage)


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_what_is_wrong_is_told_and_nobody_else_notices(
    server: Server, place: str, family: Family
) -> None:
    before = programs(server)
    with neighbours(place):
        count, wrong = faults(place, family())
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)
    assert ask(address, Case("/health", None, None, (200,), "GET")).status == 200
    until(lambda: settled(server))
    assert programs(server) == before


def test_methods_that_a_route_lacks(server: Server, place: str) -> None:
    count, wrong = faults(place, bad_inputs.methods(routes(server)))
    assert count > 50 and not wrong, "\n".join(wrong)


def test_every_field_is_in_the_table(server: Server) -> None:
    """Also one that comes tomorrow."""
    known = server.app._app.openapi()
    for path, operations in known["paths"].items():
        if "post" in operations:
            body = operations["post"]["requestBody"]["content"]["application/json"]["schema"]
            fields = known["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]
            tried = set(WHOLE[path]).union(*bad_inputs.OTHERS.get(path, ()))
            assert set(fields) <= tried, (path, set(fields) - tried)


def test_no_route_opens_without_the_key(server: Server) -> None:
    behind = Door(server.app._app, [KEY])
    closed = [path for path in routes(server) if path != "/health"]
    with listening(wire.config(behind, lifespan="off")) as ((host, port), _):
        address = f"http://{host}:{port}"
        count, wrong = faults(address, bad_inputs.keyless(closed, KEY))
        assert count > 20 * len(closed) and not wrong, "\n".join(wrong)
        for case in (
            Case("/health", None, None, (200,), "GET", ()),
            Case("/v1/models", None, None, (200,), "GET", [("authorization", f"bearer {KEY}")]),
            Case("/v1/models", None, None, (200,), "GET", [("Authorization", f"Bearer  {KEY}")]),
        ):
            assert ask(address, case).status == 200


def tokens(address: str, content: str) -> list[int]:
    import json

    said = [{"role": "user", "content": content}]
    return json.loads(ask(address, Case(TOKENIZE, {"messages": said})).body)["tokens"]
