"""What the server says of itself, and where it cannot answer."""

import importlib.metadata
import json

import openai
import pytest

from ropewalk.serve import chat, completions, grammar, service
from tests.serve.asking import ask
from tests.serve.bad_inputs import Case
from tests.serve.test_server import SAY, until


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_a_stream_that_breaks_ends_with_an_error(client, server, monkeypatch, caplog, route):
    """That tells nobody outside why; the log has it."""

    def breaks(self, *arguments):
        raise RuntimeError("a secret")

    if route == "chat":
        monkeypatch.setattr(chat._Whole, "_read", breaks)
        stream = client.chat.completions.create(
            model="tiny", messages=SAY, stream=True, max_tokens=9
        )
    else:
        monkeypatch.setattr(completions._Whole, "_logprobs", breaks)
        stream = client.completions.create(model="tiny", prompt="a", stream=True, max_tokens=9)
    with pytest.raises(openai.APIError, match="the server failed") as caught:
        list(stream)
    assert caught.value.type == "server_error" and "secret" not in str(caught.value.body)
    assert "a secret" in caplog.text and "Traceback" in caplog.text
    until(lambda: server.host.service.open == 0)


@pytest.mark.parametrize("odd", [float("nan"), -float("inf"), -1e30])
def test_a_log_probability_is_always_a_number(client, server, monkeypatch, odd):
    """Also where weights are none."""
    token = service._token

    def told(*arguments):
        return token(*arguments)._replace(logprob=odd, ranked=((65, odd), (66, odd)))

    monkeypatch.setattr(service, "_token", told)
    plain = {"model": "tiny", "max_tokens": 2, "temperature": 0}
    scores = client.completions.create(**plain, prompt="a", logprobs=2).choices[0].logprobs
    assert set(scores.token_logprobs) == {-9999.0}
    assert {value for best in scores.top_logprobs for value in best.values()} == {-9999.0}
    asked = {**plain, "messages": SAY, "logprobs": True, "top_logprobs": 2}
    (choice,) = client.chat.completions.create(**asked).choices
    chunks = [*client.chat.completions.create(**asked, stream=True)]
    streamed = [x for c in chunks if (s := c.choices[0].logprobs) for x in s.content]
    for one in (*choice.logprobs.content, *streamed):
        assert {one.logprob, *(best.logprob for best in one.top_logprobs)} == {-9999.0}


def test_a_full_queue_is_told(client, server, monkeypatch):
    service = server.host.service
    monkeypatch.setattr(service, "open", service.limits.queue)
    each = [
        lambda: client.completions.create(model="tiny", prompt="a"),
        lambda: client.chat.completions.create(model="tiny", messages=SAY, stream=True),
        lambda: client.responses.create(model="tiny", input="a"),
        lambda: client.embeddings.create(model="tiny", input=["a"] * 99),
    ]
    for one in each:
        with pytest.raises(openai.RateLimitError, match="try again") as caught:
            one()
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.type == "rate_limit_error"


def test_a_compiler_that_is_busy_is_no_fault_of_the_request(client, server, monkeypatch):
    monkeypatch.setattr(grammar, "WAIT_S", 0.01)
    form = {"type": "regex", "regex": "a busy one"}
    asked = {"model": "tiny", "messages": SAY, "response_format": form}
    busy = pytest.raises(openai.InternalServerError, match="try again")
    with server.host.grammars._trials._lock, busy as caught:
        client.chat.completions.create(**asked)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.type == "server_error"
    assert client.chat.completions.create(**asked).choices[0].message.content == "a busy one"
    with pytest.raises(openai.BadRequestError, match="unclosed group"):
        client.chat.completions.create(**{**asked, "response_format": {**form, "regex": "(("}})


def test_a_server_that_ends_takes_nothing_more(client, server, address, monkeypatch):
    monkeypatch.setattr(server, "draining", True)
    with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
        client.completions.create(model="tiny", prompt="a")
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "5"
    for method, body in (("GET", b"shutting down"), ("HEAD", b"")):
        told = ask(address, Case("/ready", None, None, (503,), method, ()))
        assert told.status == 503 and (body in told.body if body else not told.body)
    assert ask(address, Case("/health", None, None, (200,), "GET", ())).status == 200


def test_states_are_told_by_their_heads_alone(server, address):
    for path in ("/health", "/ready"):
        told = ask(address, Case(path, None, None, (200,), "HEAD", ()))
        assert told.status == 200 and not told.body
    told = ask(address, Case("/version", None, None, (200,), "GET", ()))
    assert json.loads(told.body) == {"version": importlib.metadata.version("ropewalk")}


@pytest.mark.parametrize(("given", "kept"), [("job-17", True), ("a b", False), ("x" * 65, False)])
def test_a_request_keeps_its_own_id(address, given, kept):
    headers = [("x-request-id", given)]
    for path, status in (("/v1/models", 200), ("/nowhere", 404)):
        told = ask(address, Case(path, None, None, (status,), "GET", headers))
        assert told.status == status
        found = told.headers["x-request-id"]
        assert found == given if kept else found.startswith("req-")


def test_the_end_of_an_answer_is_no_content(client, server):
    end = str(server.host.tokenizer.eos_ids[0])
    told = client.chat.completions.create(
        model="tiny", messages=SAY, max_tokens=5, logprobs=True, logit_bias={end: 100}
    )
    assert told.choices[0].finish_reason == "stop" and told.usage.completion_tokens == 1
    assert told.choices[0].logprobs.content == []


def test_a_model_without_an_end_keeps_to_no_format(client, server, monkeypatch):
    monkeypatch.setattr(server.host, "grammars", None)
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 7}
    assert client.completions.create(**asked).choices[0].finish_reason in ("length", "stop")
    with pytest.raises(openai.BadRequestError, match="no token that ends an answer"):
        held = {"response_format": {"type": "json_object"}}
        client.completions.create(**asked, extra_body=held)
