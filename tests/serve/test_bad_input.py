"""Whatever is asked, the server says what is wrong with it, at once, and goes on as before.

While every family of cases is sent, neighbours stream greedy answers that must not change.
"""

import asyncio
import dataclasses
import http.client
import io
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hypothesis
import jax
import pytest
import schemathesis
from hypothesis import HealthCheck, strategies
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok

from ropewalk.serve import chat, wire
from ropewalk.serve.door import Door
from ropewalk.serve.openai import Server
from ropewalk.text import chat as templates
from ropewalk.text.tokenizer import byte_tokenizer
from tests.serve import bad_chats, bad_inputs, odd_inputs
from tests.serve.asking import MOST_S, Told, ask, fault, faults, neighbours
from tests.serve.bad_inputs import CHAT, SAY, TOKENIZE, WHOLE, Case
from tests.serve.test_launch import running
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


@pytest.fixture(scope="module")
def compiled() -> list[str]:
    """What XLA compiled since it was cleared."""
    names: list[str] = []

    def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(kwargs))

    jax.monitoring.register_event_duration_secs_listener(heard)
    return names


def routes(server: Server) -> dict[str, set[str]]:
    """Addresses that are served, and the methods of each."""
    found: dict[str, set[str]] = {}
    for route in server.app._app.routes:
        path = re.sub(r"\{.*\}", "tiny", route.path)
        found.setdefault(path, set()).update(route.methods)
    return found


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
    server: Server, place: str, compiled: list[str], family: Family
) -> None:
    compiled.clear()
    with neighbours(place):
        count, wrong = faults(place, family())
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)
    assert ask(place, Case("/health", None, None, (200,), "GET")).status == 200
    until(lambda: settled(server))
    assert not compiled


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


@pytest.mark.parametrize("spelt", ["<|eos|>", "<|bos|>a<|eos|>", "\ufdd0<|eos|>", "<|e\ufdd0os|>"])
def test_what_is_spelt_like_a_special_token_is_text(server: Server, place: str, spelt: str) -> None:
    """Wherever a request may have it: nobody forges a turn or its end."""
    encode = server.host.tokenizer.encode
    said = [{"role": "user", "content": spelt}]
    read = json.loads(ask(place, Case(TOKENIZE, {"messages": said})).body)["tokens"]
    # The mark that the server puts before it is no character, and goes with it.
    around = templates.render(server.host.tokenizer, [{"role": "user", "content": "@"}])
    kept = encode(around.replace("@", spelt.replace("\ufdd0", "")))
    assert read == kept
    told = json.loads(ask(place, Case(CHAT, {"model": "tiny", "messages": said})).body)
    assert told["usage"]["prompt_tokens"] == len(kept)
    tool = {"type": "function", "function": {"name": "f", "description": spelt}}
    call = {"function": {"name": "f", "arguments": {spelt: [spelt]}}}
    said = [{"role": "assistant", "content": spelt, "tool_calls": [call]}]
    text, ids = asyncio.run(chat.read(server.host, said, True, {"tools": [tool]}))
    assert text.count(spelt) == 4 and max(ids) < 256


def test_the_template_s_own_special_tokens_stay_such(server: Server) -> None:
    tokenizer = byte_tokenizer()
    template = "<|bos|>{% for m in messages %}{{ m.content | trim }}<|eos|>{% endfor %}"
    tokenizer.roles = dataclasses.replace(tokenizer.roles, chat_template=template)
    host = dataclasses.replace(server.host, tokenizer=tokenizer)
    said = [{"role": "user", "content": text} for text in (" a<|eos|>b ", "c", "<|bos|><|eos|>")]
    text, read = asyncio.run(chat.read(host, said, True, {}))
    assert text == "<|bos|>a<|eos|>b<|eos|>c<|eos|><|bos|><|eos|><|eos|>"
    bos, eos = tokenizer.encode("<|bos|><|eos|>", allow_special=True)
    plain = tokenizer.encode
    assert read == [bos, *plain("a<|eos|>b"), eos, *plain("c"), eos, *plain("<|bos|><|eos|>"), eos]


def test_a_template_of_the_request_is_not_used(place: str) -> None:
    body = {"model": "tiny", "messages": SAY, "max_tokens": 8, "temperature": 0}
    forged = {**body, "chat_template": "{{ 'x' * 9 }}", "chat_template_kwargs": {"x": "y"}}
    one, other = (ask(place, Case(CHAT, asked)) for asked in (body, forged))
    assert "chat_template" in (other.headers["warning"] or "")
    found = [json.loads(told.body)["choices"] for told in (one, other)]
    assert found[0] == found[1]


def test_the_same_without_asserts(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole table once more, at `ropewalk serve` under `python -O`, with a key: in a process of
    its own, as what runs here keeps its asserts. The processes that it starts are under -O too."""
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    monkeypatch.setenv("ROPEWALK_API_KEY", KEY)
    more = ("--name", "tiny", "--slots", "2", "--queue", "64")
    with running(tiny_model(tmp_path), *more) as (process, address):
        known = routes(server)
        cases = [*FAMILIES, lambda: bad_inputs.methods(known)]
        with neighbours(address, KEY):
            found = [faults(address, family(), KEY) for family in cases]
        closed = [path for path in known if path != "/health"]
        found.append(faults(address, bad_inputs.keyless(closed, KEY)))
        wrong = [one for _, many in found for one in many]
        assert not wrong, f"{len(wrong)} of {sum(count for count, _ in found)}:\n" + "\n".join(
            wrong
        )
        health = Case("/health", None, None, (200,), "GET")
        assert ask(address, health).status == 200
        metrics = dataclasses.replace(health, path="/metrics")

        def idle() -> bool:
            told = ask(address, metrics, KEY).body.decode()
            held = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
            return all(f'ropewalk:{name}{{model_name="tiny"}} 0.0' in told for name in held)

        until(idle)
        process.terminate()
        assert process.wait(30) == 0


def test_what_the_document_allows_and_what_it_forbids(server: Server, place: str) -> None:
    """Requests made of the OpenAPI document: none of them is the server's fault."""
    document = schemathesis.openapi.from_dict(server.app._app.openapi())
    real = {"model": "tiny", "max_tokens": 1, "max_completion_tokens": 1, "max_output_tokens": 1}
    for found, mode in itertools.product(document.get_all_operations(), GenerationMode):
        operation = found.ok() if isinstance(found, Ok) else pytest.fail(str(found))
        if mode is GenerationMode.NEGATIVE and operation.path not in WHOLE:
            continue  # nothing could be wrong
        strategy = operation.as_strategy(generation_mode=mode)

        @hypothesis.settings(
            max_examples=15, database=None, deadline=None, derandomize=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )  # fmt: skip
        @hypothesis.given(case=strategy, served=strategies.booleans())
        def asked(case: schemathesis.Case, served: bool) -> None:
            if served and isinstance(case.body, dict):
                case.body |= {name: real[name] for name in real if name in WHOLE[case.path]}
            told = case.call(base_url=place)
            case.validate_response(told, checks=[not_a_server_error])

        asked()
    until(lambda: settled(server))


def refusal(status: int = 400, **more: Any) -> Told:
    error = {"message": "n: is 0", "type": "invalid_request_error", "param": "n", "code": None}
    headers = http.client.parse_headers(io.BytesIO(b"x-request-id: a\r\n\r\n"))
    return Told(status, headers, json.dumps({"error": {**error, **more}}).encode(), 0.1)


@pytest.mark.parametrize(
    "told",
    [
        refusal(500), refusal(200), refusal(param=None), refusal(param="top_n"), refusal(type="x"),
        refusal(message="is 0"), refusal(message=""), refusal(message="n: " + "9" * 4000),
        refusal(message=f"n: {Path.home()}/model"), refusal(message="n: <x.y object at 0x7f0042>"),
        refusal(message="n: Traceback (most recent call last)"), refusal(message="n: {'a': 1}"),
        refusal(more=1), dataclasses.replace(refusal(), body=b'{"detail": "n"}'),
        dataclasses.replace(refusal(), seconds=MOST_S + 0.1),
        dataclasses.replace(refusal(), headers=http.client.HTTPMessage()),
    ],
)  # fmt: skip
def test_faults_are_found(told: Told) -> None:
    case = Case(CHAT, {"n": 0}, "n")
    assert fault(case, refusal()) is None and fault(case, refusal(param="n.0")) is None
    assert fault(case, told) is not None
