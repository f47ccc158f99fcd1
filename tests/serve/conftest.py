"""One server of a tiny model for all tests that ask it, and one worker for those."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from ropewalk.serve.openai import Server
from tests.serve.tiny_server import serving, tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Programs are compiled once for the tests of one server, and of one family's engine."""
    for item in items:
        if isinstance(item, pytest.Function) and Path(__file__).parent in item.path.parents:
            if "server" in item.fixturenames:
                item.add_marker(pytest.mark.xdist_group("server"))
            elif name := getattr(item, "callspec", None) and item.callspec.params.get("name"):
                item.add_marker(pytest.mark.xdist_group(f"engine of {name}"))


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
