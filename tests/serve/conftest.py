"""One server of a tiny model for all tests that ask it; small blocks for those of the engine."""

import dataclasses
from collections.abc import Iterator

import openai
import pytest

from ropewalk.layers import cache
from ropewalk.serve.openai import Server
from tests.serve.tiny_server import CHANNELED, serving, tiny


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return tiny(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def address(server: Server) -> Iterator[str]:
    with serving(server) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    """Two pages are looked at together, so that sequences need several goes."""
    before, cache._TOGETHER = cache._TOGETHER, 8
    yield
    cache._TOGETHER = before


@pytest.fixture
def channeled(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that knows channels."""
    tokenizer = server.host.tokenizer
    roles = dataclasses.replace(tokenizer.roles, chat_template=CHANNELED)
    monkeypatch.setattr(tokenizer, "roles", roles)
