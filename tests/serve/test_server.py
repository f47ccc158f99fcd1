"""The server through OpenAI's own client, streaming and not, sync and async."""

import asyncio
import base64
import json
import re
import time

import jax.numpy as jnp
import numpy as np
import openai
import pytest

from ropewalk.checkpoint.pretrained import load
from ropewalk.layers.lm import with_parameters
from ropewalk.serve import embeddings, grammar
from ropewalk.serve.asked import Message
from ropewalk.serve.chat import message
from ropewalk.text import chat as templates
from tests.serve.asking import ask
from tests.serve.bad_inputs import Case
from tests.serve.tiny_server import CHANNELED, LENGTH, TEMPLATE, tiny_model

SAY = [{"role": "user", "content": "Say something."}]
# Of `<tool_call>` and `<think>`, which a model may begin with, the second has an h.
NO_THOUGHT = {str(ord("h")): -100}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 5},
                    "days": {"enum": [1, 2]},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "news")
]

FORMATTED = {
    "model": "tiny", "messages": SAY, "max_tokens": 300, "temperature": 0,
    "response_format": {"type": "json_object"},
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same model without a server."""
    return load(tiny_model(tmp_path_factory.mktemp("alone")))


@pytest.mark.parametrize("prompt", ["Once upon a time", "é🦀", list(range(40, 120)), "x" * 180])
def test_a_greedy_completion_is_the_model_s_own(client, alone, prompt):
    told = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=30)
    wanted = alone.generate([prompt], max_new_tokens=30)[0]
    choice = told.choices[0]
    assert choice.text == wanted.text
    assert told.usage.completion_tokens == len(wanted.tokens)
    ended = wanted.tokens[-1] in alone.tokenizer.eos_ids
    assert choice.finish_reason == ("stop" if ended else "length")


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_a_seed_gives_the_tokens_of_the_plain_decoder(client, alone, temperature):
    knobs = {"temperature": temperature, "top_p": 0.9, "seed": 11}
    told = client.completions.create(model="tiny", prompt="Once", max_tokens=20, **knobs)
    assert told.choices[0].text == alone.generate(["Once"], 20, **knobs)[0].text


@pytest.mark.parametrize("more", [{}, {"n": 3, "seed": 5, "temperature": 1}, {"logprobs": 3}])
def test_a_stream_is_the_whole_in_pieces(client, more):
    asked = {"model": "tiny", "prompt": ["One", "Two"], "max_tokens": 15, "temperature": 0, **more}
    whole = client.completions.create(**asked)
    stream = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    texts, reasons, usage, tokens, offsets = {}, {}, None, {}, {}
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
            if choice.logprobs:
                tokens.setdefault(choice.index, []).extend(choice.logprobs.token_logprobs)
                offsets.setdefault(choice.index, []).extend(choice.logprobs.text_offset)
    assert len(whole.choices) == 2 * more.get("n", 1)
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert reasons[choice.index] == choice.finish_reason
        if "logprobs" in more:
            wanted = choice.logprobs.token_logprobs
            np.testing.assert_allclose(tokens[choice.index], wanted, atol=1e-4)
            assert offsets[choice.index] == choice.logprobs.text_offset
    assert usage is not None
    found, wanted = (
        told.model_dump(exclude={"prompt_tokens_details"}) for told in (usage, whole.usage)
    )
    assert found == wanted


def test_prompts_are_scored_as_the_full_forward_pass_does(client, alone):
    prompt = list(range(60, 110))
    told = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=1, logprobs=2, echo=True, temperature=0
    )
    scores = told.choices[0].logprobs
    logits = jnp.asarray(alone.logits([prompt]))[0]
    full = np.asarray(logits - jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True)))
    wanted = full[np.arange(len(prompt) - 1), prompt[1:]]
    assert scores.token_logprobs[0] is None and len(scores.tokens) == len(prompt) + 1
    np.testing.assert_allclose(scores.token_logprobs[1:-1], wanted, atol=1e-4)
    np.testing.assert_allclose(scores.token_logprobs[-1], full[-1].max(), atol=1e-4)
    assert told.choices[0].text.startswith(alone.tokenizer.decode(prompt))
    silent = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=0, logprobs=2, echo=True, temperature=0
    )
    assert silent.choices[0].logprobs.token_logprobs == scores.token_logprobs[:-1]
    assert silent.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_are_those_of_characters(client, stream):
    """Each token is at the character of the text that its bytes are of."""
    prompt, asked = "aé🦀 b", {"max_tokens": 3, "logprobs": 0, "temperature": 0, "echo": True}
    told = client.completions.create(
        model="tiny", prompt=prompt, logit_bias={str(ord("z")): 100}, stream=stream, **asked
    )
    choices = [chunk.choices[0] for chunk in told] if stream else told.choices
    text = "".join(choice.text for choice in choices)
    offsets = [at for choice in choices for at in choice.logprobs.text_offset]
    assert text == prompt + "zzz"
    assert offsets == [0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 5, 6, 7]  # the first begins the document


def test_a_stop_string_ends_an_answer_before_it(client):
    free = client.completions.create(model="tiny", prompt="abc", max_tokens=40, temperature=0)
    text = free.choices[0].text
    stop = text[5:8]
    cut = client.completions.create(
        model="tiny", prompt="abc", max_tokens=40, temperature=0, stop=["never", stop]
    )
    assert cut.choices[0].text == text[: text.find(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_biases_penalties_and_stop_ids_reach_the_device(client):
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "temperature": 0}
    biased = client.completions.create(**asked, logit_bias={"65": 100})
    assert biased.choices[0].text == "A" * 12
    penalized = client.completions.create(**asked, logit_bias={"65": 20}, frequency_penalty=2)
    assert len(set(penalized.choices[0].text)) > 1
    stopped = client.completions.create(
        **asked, logit_bias={"65": 100}, extra_body={"stop_token_ids": [65]}
    )
    assert stopped.usage.completion_tokens == 1 and stopped.choices[0].finish_reason == "stop"


def test_a_chat_streams_what_it_tells_at_once(client):
    asked = {"model": "tiny", "messages": SAY, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    text, reason, scores = "", None, []
    for chunk in client.chat.completions.create(
        **asked, stream=True, logprobs=True, top_logprobs=2
    ):
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
        scores += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    told = whole.choices[0]
    assert (text, reason) == (told.message.content, told.finish_reason)
    # The second time the prompt's beginning is found in pages: float32 sums in another order.
    wanted = [s.logprob for s in told.logprobs.content]
    np.testing.assert_allclose([s.logprob for s in scores], wanted, atol=1e-4)
    assert all(len(s.top_logprobs) == 2 for s in scores)


def test_answers_to_a_conversation_are_those_to_its_template(client, server):
    tokenizer = server.host.tokenizer
    rendered = templates.render(tokenizer, SAY)
    told = client.chat.completions.create(model="tiny", messages=SAY, max_tokens=10, temperature=0)
    plain = client.completions.create(
        model="tiny", prompt=tokenizer.encode(rendered), max_tokens=10, temperature=0
    )
    assert told.choices[0].message.content == plain.choices[0].text


@pytest.mark.parametrize(
    "said",
    [
        [{"type": "text", "text": "I "}, {"type": "refusal", "refusal": "cannot"}],
        [{"type": "refusal", "refusal": "I cannot"}],
        None,
    ],
)
def test_a_refusal_is_what_the_assistant_said(client, said):
    def read(**message) -> int:
        told = client.chat.completions.create(
            model="tiny", messages=[*SAY, message], max_tokens=1, temperature=0
        )
        return told.usage.prompt_tokens

    refusal = None if said else "I cannot"
    plain = read(role="assistant", content="I cannot")
    assert read(role="assistant", content=said, refusal=refusal) == plain
    with pytest.raises(openai.BadRequestError, match="content"):
        read(role="user", content=said, refusal=refusal)


def test_thinking_is_counted(client, server, monkeypatch):
    """Of every answer, streamed and not; a token of this model is a byte."""
    thought, answer = "<think>\nHm\n</think>\n\n", "Yes"
    scripted(monkeypatch, server, thought + answer)
    asked = {**FORMATTED, "n": 2}
    whole = client.chat.completions.create(**asked).usage
    streamed = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    (usage,) = [chunk.usage for chunk in streamed if chunk.usage]
    for one in (whole, usage):
        assert one.completion_tokens_details.reasoning_tokens == 2 * len(thought)
        assert one.completion_tokens == 2 * len(thought + answer) + 2
    scripted(monkeypatch, server, answer)
    usage = client.chat.completions.create(**FORMATTED).usage
    assert usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_channels_are_thought_and_answer(client, server, monkeypatch, channeled, stream):
    analysis = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant"
    scripted(monkeypatch, server, f"{analysis}<|channel|>final<|message|>Yes")
    answer = client.chat.completions.create(**FORMATTED, stream=stream)
    choices = [one.choices[0] for one in answer] if stream else answer.choices
    said = [choice.delta if stream else choice.message for choice in choices]
    thought = [getattr(one, "reasoning_content", None) or "" for one in said]
    assert "".join(thought) == "Hm" and "".join(one.content or "" for one in said) == "Yes"
    if not stream:
        header = "<|channel|>final<|message|>"
        details = answer.usage.completion_tokens_details
        assert details.reasoning_tokens == len(analysis + header)


def test_channels_hold_calls_and_formats(client, channeled):
    """By the real grammars; a bias takes the model past its thoughts."""
    asked = {"model": "tiny", "messages": SAY, "temperature": 0, "max_tokens": 300}
    soon = {str(ord("c")): 100, str(ord('"')): 90, str(ord("f")): 80}
    told = client.chat.completions.create(
        **asked, tools=TOOLS, tool_choice="required", logit_bias=soon
    ).choices[0]
    (call,) = told.message.tool_calls
    assert told.finish_reason == "tool_calls" and told.message.content is None
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    form = {"type": "regex", "regex": r"(cat|dog){2}!"}
    told = client.chat.completions.create(**asked, response_format=form, logit_bias=soon)
    assert re.fullmatch(r"(cat|dog){2}!", told.choices[0].message.content)


def test_all_instructions_are_read_where_a_template_takes_one(client, channeled):
    def read(*talk):
        asked = {"model": "tiny", "messages": talk, "max_tokens": 1, "temperature": 0}
        return client.chat.completions.create(**asked).usage.prompt_tokens

    told = (
        {"role": "system", "content": "Be brief"},
        {"role": "developer", "content": "In French"},
    )
    joined = {"role": "system", "content": "Be brief\n\nIn French"}
    assert read(told[0], *SAY, told[1]) == read(joined, *SAY) > read(told[0], *SAY)
    body = {"messages": [told[0], *SAY, told[1]]}
    assert client.post("/../tokenize", body=body, cast_to=dict)["count"] == read(joined, *SAY)


def test_thought_goes_back_by_the_name_that_a_template_has():
    call = {"id": "c", "type": "function", "function": {"name": "news", "arguments": "{}"}}
    said = {"role": "assistant", "content": "So", "reasoning_content": "Hm", "tool_calls": [call]}
    for one, has in (
        (said, {"content": "", "thinking": "Hm\n\nSo"}),
        ({**said, "tool_calls": None}, {"content": "So", "thinking": "Hm"}),
    ):
        told = message(Message.model_validate(one), CHANNELED)
        assert {name: told[name] for name in has} == has
    assert "thinking" not in message(Message.model_validate(said), TEMPLATE)


def test_how_much_is_thought_is_the_template_s_to_know(client, server, monkeypatch, channeled):
    asked = {"model": "tiny", "max_tokens": 1, "temperature": 0}

    def read(**more):
        raw = client.chat.completions.with_raw_response.create(**asked, messages=SAY, **more)
        return raw.parse().usage.prompt_tokens, raw.headers.get("warning", "")

    plain, high = read(), read(reasoning_effort="high")
    assert high == (plain[0] + len("high"), "")
    named = {"chat_template_kwargs": {"reasoning_effort": "minimal"}}
    assert read(reasoning_effort="high", extra_body=named)[0] == plain[0] + len("minimal")
    raw = client.responses.with_raw_response.create
    told = raw(model="tiny", input="Say something.", reasoning={"effort": "high"}, temperature=0)
    assert told.parse().usage.input_tokens == high[0] and "warning" not in told.headers
    monkeypatch.undo()
    assert "reasoning_effort changes nothing" in read(reasoning_effort="high")[1]
    told = raw(model="tiny", input="Say something.", reasoning={"effort": "high"}, temperature=0)
    assert "reasoning.effort changes nothing" in told.headers["warning"]


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_ends_an_answer_that_may_have_no_more(client, server, monkeypatch, stream):
    call = '<tool_call>\n{"name": "news", "arguments": {"days": 1}}\n</tool_call>'
    scripted(monkeypatch, server, f"So. {call}{call}Yes")
    asked = {**FORMATTED, "tools": TOOLS, "stream": stream}

    def told(**more):
        """Text, arguments of calls, and how it ended."""
        answer = client.chat.completions.create(**asked, **more)
        choices = [one.choices[0] for one in answer] if stream else answer.choices
        said = [choice.delta if stream else choice.message for choice in choices]
        arguments = [call.function.arguments for one in said for call in one.tool_calls or ()]
        text = "".join(one.content or "" for one in said)
        return text, "".join(arguments), choices[-1].finish_reason

    assert told() == ("So. Yes", '{"days": 1}' * 2, "tool_calls")
    assert told(parallel_tool_calls=False) == ("So.", '{"days": 1}', "tool_calls")
    until(lambda: server.host.service.open == 0)


def test_a_format_beside_tools_is_told_to_hold_the_whole_answer(client):
    asked = {**FORMATTED, "tools": TOOLS, "max_tokens": 4}
    raw = client.chat.completions.with_raw_response.create
    assert "response_format holds the whole answer" in raw(**asked).headers["warning"]
    for more in ({"tool_choice": "none"}, {"tool_choice": "required"}):
        assert "warning" not in raw(**asked, **more).headers


def test_clamped_answers_are_noted_by_the_field_that_asked(client):
    raw = client.completions.with_raw_response.create(
        model="tiny", prompt=["a", "b", "abc"], max_tokens=2000, temperature=0,
        logit_bias={"257": 100},
    )  # fmt: skip
    warning = raw.headers["warning"]
    assert warning.count("max_tokens 2000 clamped to") == 2
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=SAY, max_completion_tokens=2000, temperature=0
    )
    assert "max_completion_tokens 2000 clamped to" in raw.headers["warning"]


def test_max_tokens_is_clamped_with_a_note(client):
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=SAY, max_tokens=100_000, temperature=0, extra_body={"odd": 1}
    )
    warning = raw.headers["warning"]
    assert "max_tokens 100000 clamped to" in warning and "odd" in warning
    usage = raw.parse().usage
    assert usage.total_tokens <= LENGTH


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "news"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_keeps_to_its_schema(client, choice, stream):
    asked = {
        "model": "tiny", "messages": SAY, "tools": TOOLS, "tool_choice": choice, "temperature": 0,
        "parallel_tool_calls": False, "logit_bias": NO_THOUGHT,
    }  # fmt: skip
    if stream:
        calls: dict[int, list[str]] = {}
        reason = None
        for chunk in client.chat.completions.create(**asked, stream=True):
            reason = chunk.choices[0].finish_reason
            for call in chunk.choices[0].delta.tool_calls or ():
                known = calls.setdefault(call.index, ["", ""])
                known[0] += call.function.name or ""
                known[1] += call.function.arguments or ""
        found = [*calls.values()]
    else:
        told = client.chat.completions.create(**asked).choices[0]
        reason = told.finish_reason
        found = [[c.function.name, c.function.arguments] for c in told.message.tool_calls]
    assert reason == "tool_calls"
    for name, arguments in found:
        assert name in ("weather", "news") and (choice == "required" or name == "news")
        parsed = json.loads(arguments)
        assert set(parsed) == {"city", "days"} and parsed["days"] in (1, 2)


def test_formats_hold_the_answer(client):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"type": "null"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    asked = {"model": "tiny", "messages": SAY, "temperature": 1, "seed": 3}

    def said(form) -> str:
        told = client.chat.completions.create(**asked, response_format=form)
        return told.choices[0].message.content

    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert set(json.loads(said(wanted))) == {"a", "b"}
    form = {"type": "regex", "regex": r"(cat|dog){2,3}!"}
    assert re.fullmatch(r"(cat|dog){2,3}!", said(form))
    told = client.completions.create(
        model="tiny", prompt="x", max_tokens=40, extra_body={"response_format": form}
    )
    assert re.fullmatch(r"(cat|dog){2,3}!", told.choices[0].text)


def test_embeddings_are_hidden_states(client, alone):
    prompts = ["abc", "a longer one " * 10]
    told = client.embeddings.create(model="tiny", input=prompts)
    for one, found in zip(prompts, told.data, strict=True):
        ids = jnp.asarray([alone.encode(one)])
        x = with_parameters(alone.structure, alone.params).hidden(ids)[0][0]
        mean = np.asarray(jnp.mean(x, axis=0))
        np.testing.assert_allclose(found.embedding, mean / np.linalg.norm(mean), atol=1e-5)
    raw = client.embeddings.with_raw_response.create(
        model="tiny", input="abc", encoding_format="base64", extra_body={"pooling": "last"}
    )
    row = np.frombuffer(base64.b64decode(json.loads(raw.text)["data"][0]["embedding"]), np.float32)
    assert abs(np.linalg.norm(row) - 1) < 1e-5


def test_more_embeddings_than_the_queue_holds(client, server, monkeypatch):
    """Half of which is left to others; when somebody leaves, so does all of it."""
    queue, most = server.host.service.limits.queue, 0
    submit = server.host.service.submit

    def counted(jobs):
        nonlocal most
        submit(jobs)
        most = max(most, server.host.service.open)

    monkeypatch.setattr(server.host.service, "submit", counted)
    told = client.embeddings.create(model="tiny", input=[f"a{i % 7}" for i in range(3 * queue)])
    assert most == queue // 2
    each = client.embeddings.create(model="tiny", input=[f"a{i}" for i in range(7)]).data
    for i, one in enumerate(told.data):
        np.testing.assert_allclose(one.embedding, each[i % 7].embedding, atol=1e-5)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.1).embeddings.create(model="tiny", input=["x" * 500] * 2048)
    until(lambda: server.host.service.open == 0)


def test_the_asynchronous_client_is_told_the_same(client, address):
    chat_ = {"model": "tiny", "messages": SAY, "max_tokens": 8, "temperature": 0}

    async def everything():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="-") as other:
            told = await other.chat.completions.create(**chat_)
            stream = await other.chat.completions.create(**chat_, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            vectors = await other.embeddings.create(model="tiny", input=["a", "b"])
            models = [model.id async for model in other.models.list()]
            return told.choices[0].message.content, text, vectors.data, models

    whole, text, vectors, models = asyncio.run(everything())
    assert whole == text == client.chat.completions.create(**chat_).choices[0].message.content
    wanted = client.embeddings.create(model="tiny", input=["a", "b"]).data
    for one, other in zip(vectors, wanted, strict=True):
        np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-5)
    assert models == ["tiny"]


def test_many_at_once_are_as_alone(address, alone):
    """Of several kinds together, more than there are slots; each is what it would be alone."""
    prompts = [f"Number {i} " * (1 + i % 5) for i in range(24)]

    async def everything():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="-") as client:

            async def one(i: int) -> str:
                asked = {"model": "tiny", "prompt": prompts[i], "temperature": 0, "max_tokens": 20}
                if i % 2:
                    told = await client.completions.create(**asked)
                    return told.choices[0].text
                stream = await client.completions.create(**asked, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, range(len(prompts))))

    found = asyncio.run(everything())
    wanted = [alone.generate([one], 20)[0].text for one in prompts]
    assert found == wanted


def test_a_beginning_met_again_is_not_read_again(client):
    prompt = "This beginning is long enough to fill some pages of the cache. " * 2
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 5, "temperature": 0}
    first, again = (client.completions.create(**asked) for _ in range(2))
    other = client.completions.create(**asked, extra_body={"cache_salt": "mine"})
    assert again.usage.prompt_tokens_details.cached_tokens >= 96
    assert other.usage.prompt_tokens_details.cached_tokens == 0
    assert first.choices[0].text == again.choices[0].text == other.choices[0].text


def test_who_leaves_is_forgotten(client, server):
    """A stream that is closed frees its slot; so does a request that is given up."""
    stream = client.completions.create(
        model="tiny", prompt="abc", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.02).completions.create(
            model="tiny", prompt="abc", max_tokens=200, extra_body={"ignore_eos": True}
        )
    until(lambda: server.host.service.open == 0)
    assert server.host.service.scheduler.usage == 0


def test_nothing_is_compiled_while_serving(client, server):
    """Whatever is asked for: lengths, numbers of answers, options."""
    engine, rng = server.host.service.engine, np.random.default_rng(0)
    before = engine.programs()
    for i in range(40):
        more = {"logprobs": 5, "echo": True} if i % 4 == 0 else {}
        more |= {"presence_penalty": 1.0} if i % 3 == 0 else {}
        more |= {"logit_bias": {"70": 5}} if i % 5 == 0 else {}
        client.completions.create(
            model="tiny", prompt=rng.integers(0, 250, rng.integers(1, 900)).tolist(),
            max_tokens=int(rng.integers(1, 20)), n=int(rng.integers(1, 4)),
            temperature=float(rng.choice([0, 0.5, 1.0])), top_p=float(rng.uniform(0.1, 1)),
            extra_body={"top_k": int(rng.integers(0, 100))}, **more,
        )  # fmt: skip
    for regex in ("[ab]{3,9}", "x+"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], n=3, max_tokens=9,
            response_format={"type": "regex", "regex": regex},
        )  # fmt: skip
    assert engine.programs() == before


def test_fields_that_change_nothing_are_named_wherever_they_are(client, address):
    part = {"type": "text", "text": "a", "cache_control": {}, "odd": None}
    talk = [{"role": "user", "content": [part]}, {"role": "user", "content": "b", "of": 1}]
    more = {"tools": [{**TOOLS[0], "cache": 1}], "tool_choice": "none", "store": True}
    asked = {"model": "tiny", "messages": talk, "max_tokens": 1, **more}
    raw = client.with_raw_response
    warning = raw.chat.completions.create(**asked).headers["warning"]
    named = "store messages.of tools.cache messages.content.cache_control"
    assert f'fields that change nothing: {named}"' in warning
    for route, body in (("tokenize", {"prompt": "a"}), ("detokenize", {"tokens": [65]})):
        told = ask(address, Case(f"/{route}", {**body, "odd": 1}))
        assert told.headers["warning"] == '299 ropewalk "fields that change nothing: odd"'
        assert "warning" not in ask(address, Case(f"/{route}", body)).headers


def test_embeddings_that_are_no_numbers_are_an_error(client, monkeypatch):
    async def broken(host, jobs):
        return [np.array([np.nan, 1])] * len(jobs)

    monkeypatch.setattr(embeddings, "_pooled", broken)
    with pytest.raises(openai.InternalServerError, match="are no numbers"):
        client.embeddings.create(model="tiny", input="a")


def test_small_routes(client, server, address):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        client.models.retrieve("other")
    ids = client.post("/../tokenize", body={"prompt": "abc"}, cast_to=dict)["tokens"]
    assert ids == server.host.tokenizer.encode_prompt("abc")
    text = client.post("/../detokenize", body={"tokens": ids}, cast_to=dict)["prompt"]
    assert text == "abc"
    with pytest.raises(openai.BadRequestError, match="vocabulary is 0 to 263"):
        client.post("/../detokenize", body={"tokens": [264]}, cast_to=dict)
    metrics = client.get("/../metrics", cast_to=str)
    for name in (
        "num_requests_running", "generation_tokens_total", "time_to_first_token_seconds",
        "iteration_tokens_total_bucket", "request_params_max_tokens_bucket",
    ):  # fmt: skip
        assert f"ropewalk:{name}" in metrics and f"vllm:{name}" in metrics
    assert client.get("/../health", cast_to=dict) == {"status": "ok"}
    assert client.get("/../ready", cast_to=dict) == {"status": "ready"}


def scripted(monkeypatch, server, text: str) -> None:
    """Makes the model write one text where a format is asked for."""

    async def matcher(spec, param, thinking=""):
        return server.host.grammars.compile(grammar.Lark(f"start: {json.dumps(text)}"))

    monkeypatch.setattr(server.host, "matcher", matcher)


def until(holds, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
