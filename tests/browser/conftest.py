"""A browser, and a server of a tiny model. These tests run only where they are named
(`pytest tests/browser`), as they need the Debian packages chromium and chromium-driver."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ropewalk.serve.openai import Server
from tests.browser.driver import Browser, browsing
from tests.serve import tiny_server

HERE = Path(__file__).parent
LENGTH = 1024


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    named = (Path(argument.split("::")[0]).resolve() for argument in config.args)
    return None if any(path.is_relative_to(HERE) for path in named) else True


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_server.CONFIG, "max_position_embeddings", LENGTH)
        return tiny_server.tiny(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def address(server: Server) -> Iterator[str]:
    with tiny_server.serving(server) as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        raise RuntimeError("needs the Debian packages chromium and chromium-driver")
    with browsing(driver) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Browser]:
    """The page as at a first visit; whatever a test does, it asks no other host and no script
    fails."""
    browser.look(1280, 800)
    browser.open(f"{address}/health")
    browser.run("localStorage.clear(); sessionStorage.clear()")
    browser.errors()
    browser.requests().clear()
    browser.open(address)
    yield browser
    browser.command("Network.emulateNetworkConditions", **ONLINE)
    wrong = [one for one in browser.errors() if "Failed to load resource" not in one]
    assert not wrong, wrong
    asked = [urlsplit(one["url"]) for one in browser.requests()]
    elsewhere = {url.netloc for url in asked if url.scheme != "data"} - {urlsplit(address).netloc}
    assert not elsewhere, elsewhere


ONLINE = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}


@pytest.fixture
def slow(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes 20 ms for a step."""
    engine = server.host.service.engine
    generate = engine.generate

    def later(*arguments):
        time.sleep(0.02)
        return generate(*arguments)

    monkeypatch.setattr(engine, "generate", later)
