"""What the engine's thread does when something fails: the request at fault ends, and no other."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from ropewalk.serve import launch
from ropewalk.serve.asked import Completion
from ropewalk.serve.generation import Generation
from ropewalk.serve.launch import build
from tests.serve.tiny_server import options, serving, tiny_model

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


@pytest.mark.parametrize("step", ["prefill", "generate"])
def test_the_request_at_fault_ends_and_those_beside_it_go_on(client, server, monkeypatch, step):
    """It is found by reading everyone again, one at a time; the others answer as when alone."""
    bad = [9, 8, 7, 6, 9, 8, 7]
    service = server.host.service
    prompts = ["abc", "the king", "O Romeo"]
    asked = {**ASKED, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    wanted = [client.completions.create(**{**asked, "prompt": p}).choices[0].text for p in prompts]
    original = getattr(service.engine, step)

    def fails(state, what, *more):
        active = [each for each in service.scheduler._active if each.prompt == tuple(bad)]
        read = [list(getattr(each, "tokens", [])) for each in what]
        slots = [getattr(each, "slot", None) for each in what]
        if bad in read or any(each.slot in slots for each in active if step == "generate"):
            raise RuntimeError("no such request can be served")
        return original(state, what, *more)

    monkeypatch.setattr(service.engine, step, fails)
    with ThreadPoolExecutor() as pool:
        good = [pool.submit(client.completions.create, **{**asked, "prompt": p}) for p in prompts]
        with pytest.raises(openai.InternalServerError, match="the engine failed"):
            client.completions.create(**{**asked, "prompt": bad})
        assert [each.result().choices[0].text for each in good] == wanted
    assert service.scheduler.idle and service.scheduler.usage == 0 and service.alive


def test_a_device_without_room_for_a_state_is_told_and_tried_again(client, server, monkeypatch):
    service = server.host.service
    with monkeypatch.context() as patched:
        patched.setattr(service.engine, "init_decode_state", lambda: 1 / 0)
        patched.setattr(service.engine, "generate", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the engine failed"):
            client.completions.create(**ASKED)
        assert not service.alive
    assert client.completions.create(**ASKED).choices[0].finish_reason in ("length", "stop")
    assert service.alive


def test_sequences_that_lose_their_pages_answer_the_same(client, monkeypatch, tmp_path):
    """With pages for one and a half of the four that are asked for at once: penalties, seeds, a
    format and scores of the prompt go on where they were."""
    page = 2 * 2 * 2 * 16 * 8 * 4  # keys and values, layers, heads, tokens, features, float32
    monkeypatch.setattr(launch, "free_memory", lambda _: int(13.5 * page / 0.7))
    crowded = build(options(tiny_model(tmp_path / "model"), max_length=128))
    assert crowded.host.service.engine.sizes.pages == (13,)
    with serving(crowded) as address:
        other = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        regex = {"response_format": {"type": "regex", "regex": "[a-z]{90}"}}
        each = [
            {"presence_penalty": 1.0, "frequency_penalty": 0.5, "extra_body": {"ignore_eos": True}},
            {"temperature": 1.0, "seed": 5, "logprobs": 2, "extra_body": {"ignore_eos": True}},
            {"extra_body": {"ignore_eos": True, **regex}},
            {"echo": True, "logprobs": 0, "extra_body": {"ignore_eos": True}},
        ]
        asked = [{**ASKED, "prompt": f"{i} is", "max_tokens": 95, **e} for i, e in enumerate(each)]
        with ThreadPoolExecutor() as pool:
            found = [pool.submit(other.completions.create, **body) for body in asked]
            for body, one in zip(asked, found, strict=True):
                mine, alone = one.result().choices[0], client.completions.create(**body).choices[0]
                assert mine.text == alone.text
                if mine.logprobs and alone.logprobs:
                    told = mine.logprobs.token_logprobs or []
                    wanted = alone.logprobs.token_logprobs or []
                    assert told[1:] == pytest.approx(wanted[1:], abs=1e-4) and told[1:]
        assert crowded.host.service.scheduler.preemptions > 0


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


@pytest.mark.usefixtures("address")
def test_an_answer_that_nobody_reads_is_ended(server):
    """As where a client leaves before the first word is asked for."""
    host = server.host
    asked = Completion.model_validate({"model": "tiny", "prompt": "abc", "ignore_eos": True})
    jobs = host.jobs(asked, [(1, 2, 3)], [host.length - 3])
    Generation(host, jobs, host.answers(asked, jobs))
    while not host.service.scheduler.idle or not jobs[0].sequence.reason:
        time.sleep(0.01)
    assert jobs[0].sequence.reason == "cancelled"


def test_a_server_that_guesses_answers_the_same(client, server, tmp_path):
    """Whole, as a stream with log-probabilities, under a grammar, stopped in the middle, and
    beside each other; a model that guesses for itself is always right."""
    wanted = client.completions.create(**ASKED).choices[0].text
    directory = tiny_model(tmp_path / "model")
    guessing = build(options(directory, drafts=3, draft_model=str(directory)))
    made = guessing.host.service.engine.programs()
    with serving(guessing) as address:
        other = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        for asked in (
            {"max_tokens": 40},
            {"max_tokens": 37, "temperature": 1.0, "seed": 4, "presence_penalty": 0.5},
            {"max_tokens": 20, "logprobs": 2, "n": 3, "temperature": 0.7, "seed": 1},
            {"max_tokens": 60, "stop": wanted[5:8], "logprobs": 0},
        ):
            both = [
                each.completions.create(**{**ASKED, **asked}).choices for each in (client, other)
            ]
            assert [one.text for one in both[0]] == [one.text for one in both[1]]
            assert [one.finish_reason for one in both[0]] == [one.finish_reason for one in both[1]]
            told = [[one.logprobs.tokens if one.logprobs else None for one in c] for c in both]
            assert told[0] == told[1]
        held: list[Any] = [
            each.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "x"}], temperature=0,
                response_format={"type": "regex", "regex": "[a-c]{9,20}"},  # pyright: ignore[reportArgumentType]
            ).choices[0].message.content
            for each in (client, other)
        ]  # fmt: skip
        assert held[0] == held[1] and set(held[0]) <= set("abc")
        metrics = guessing.host.metrics
        drafted = metrics.value("spec_decode_num_draft_tokens_total")
        accepted = metrics.value("spec_decode_num_accepted_tokens_total")
        assert 0 < accepted <= drafted
        service = guessing.host.service
        assert service.scheduler.idle and service.scheduler.usage == 0
    assert service.engine.programs() == made


def _any():
    from ropewalk.serve.grammar import Schema

    return Schema({"type": "object"})
