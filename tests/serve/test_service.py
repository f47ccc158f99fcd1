"""What the engine's thread does when something fails: the request at fault ends, and no other."""

import openai
import pytest

ASKED = {"model": "tiny", "prompt": "abc", "max_tokens": 20, "temperature": 0}


def test_a_step_that_fails_once_is_done_again(client, server, monkeypatch):
    """The device's state is made anew and everything is read again: the answer is the same."""
    wanted = client.completions.create(**ASKED).choices[0].text
    engine, calls = server.host.service.engine, []
    generate = type(engine).generate

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("the device is gone")
        return generate(engine, *arguments)

    monkeypatch.setattr(engine, "generate", fails)
    assert client.completions.create(**ASKED).choices[0].text == wanted
    assert len(calls) == 20  # 19 tokens after the first, and the one that failed


def test_a_step_that_always_fails_ends_its_requests(client, server, monkeypatch):
    engine = server.host.service.engine
    with monkeypatch.context() as patched:
        patched.setattr(engine, "generate", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the engine failed"):
            client.completions.create(**ASKED)
    assert client.completions.create(**ASKED).choices[0].finish_reason in ("length", "stop")


def test_a_grammar_that_fails_ends_its_own_request_alone(client, server, monkeypatch):
    """While a neighbour streams on."""
    wanted = client.completions.create(**ASKED, extra_body={"ignore_eos": True}).choices[0].text
    matcher = type(server.host.grammars.compile(_any()))
    monkeypatch.setattr(matcher, "mask", lambda *_: 1 / 0)
    stream = client.completions.create(**ASKED, stream=True, extra_body={"ignore_eos": True})
    text = next(iter(stream)).choices[0].text
    with pytest.raises(openai.InternalServerError, match="the request failed"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}],
            response_format={"type": "json_object"},
        )  # fmt: skip
    assert text + "".join(chunk.choices[0].text for chunk in stream) == wanted
    service = server.host.service
    assert service.scheduler.idle and service.scheduler.usage == 0


def _any():
    from ropewalk.serve.grammar import Schema

    return Schema({"type": "object"})
