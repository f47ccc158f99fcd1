"""`/v1/responses` through OpenAI's own client, held against its types and against the chat."""

import asyncio
import dataclasses
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from ropewalk.serve import grammar
from ropewalk.serve import responses as served
from ropewalk.serve.asked import BadRequest
from tests.serve.tiny_server import LENGTH, TEMPLATE

EVENT = pydantic.TypeAdapter(ResponseStreamEvent)
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 12}
JSON = {"format": {"type": "json_object"}}
LOGPROBS: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
# The tiny model would think, or write blanks, to no end: neither an h nor a blank is in these.
BRISK = {"logit_bias": {str(byte): -100 for byte in b"h \t\r\n"}}
COLOR = {"type": "object", "properties": {"c": {"enum": ["red", "blue"]}}, "required": ["c"]}
PAINT = {"type": "function", "name": "paint", "parameters": COLOR}
CALL = '<tool_call>\n{"name": "paint", "arguments": {"c": "red"}}\n</tool_call>'


def created(client: Any, **asks: Any) -> dict[str, Any]:
    """The JSON of a response, which the client's types take as it is."""
    told = client.responses.with_raw_response.create(**GREEDY | {"input": "Hi"} | asks)
    raw = json.loads(told.text)
    Response.model_validate(raw, strict=True)
    return raw


def streamed(client: Any, **asks: Any) -> list[dict[str, Any]]:
    """The events of a stream, all of types that the client knows, numbered, and nothing else."""
    asks = GREEDY | {"input": "Hi"} | asks
    with client.responses.with_streaming_response.create(**asks, stream=True) as told:
        lines = [line for line in told.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert lines[::2] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        EVENT.validate_python(event, strict=True)
    return events


def same(told: Any) -> Any:
    """A response without what is new in each."""
    if isinstance(told, list):
        return [same(one) for one in told]
    if not isinstance(told, dict):
        return told
    new = ("id", "created_at", "call_id", "cached_tokens")
    return {key: same(value) for key, value in told.items() if key not in new}


@pytest.fixture
def writes(server, monkeypatch) -> Callable[[str], None]:
    """Makes the model write one text where JSON is asked for."""

    def script(text: str) -> None:
        async def matcher(spec: Any, param: str, thinking: str = "") -> grammar.Matcher:
            return server.host.grammars.compile(grammar.Lark(f"start: {json.dumps(text)}"))

        monkeypatch.setattr(server.host, "matcher", matcher)

    return script


@pytest.fixture
def thinking(server, monkeypatch) -> None:
    """A template that opens the thinking itself, and tells what was thought before."""
    template = TEMPLATE.replace("<|assistant|>", "<|assistant|><think>")
    template = template.replace("|>{{", "|>{{ message.reasoning_content }}{{")
    tokenizer = server.host.tokenizer
    roles = dataclasses.replace(tokenizer.roles, chat_template=template)
    monkeypatch.setattr(tokenizer, "roles", roles)


PARTS = [{"type": "input_text", "text": "Say "}, {"type": "input_text", "text": "it"}]


@pytest.mark.parametrize(
    "given",
    ["Say it", [{"role": "user", "content": "Say it"}],
     [{"type": "message", "role": "user", "content": PARTS}]],
)  # fmt: skip
def test_a_response_is_what_the_chat_answers(client, given):
    told = client.responses.create(input=given, instructions="Be brief", **GREEDY)
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Say it"}]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=12
    )
    assert told.output_text == chat.choices[0].message.content != ""
    assert told.usage.input_tokens == chat.usage.prompt_tokens
    assert told.usage.output_tokens == chat.usage.completion_tokens == 12
    assert told.usage.total_tokens == chat.usage.total_tokens


def test_a_response_repeats_what_was_asked(client):
    tools = [PAINT | {"description": "Paints", "strict": True}]
    schema = {"type": "json_schema", "name": "color", "schema": COLOR, "strict": True}
    asks = {
        "instructions": "Be brief", "metadata": {"run": "7"}, "tools": tools, "top_p": 0.5,
        "tool_choice": {"type": "function", "name": "paint"}, "parallel_tool_calls": False,
        "text": {"format": schema}, "truncation": "disabled", "user": "me", "top_logprobs": 3,
        "max_output_tokens": 60, "temperature": 0.5,
    }  # fmt: skip
    raw = created(client, **asks, store=True)
    schema["description"] = None
    assert {key: raw[key] for key in asks} == asks
    assert raw["id"].startswith("resp_") and abs(raw["created_at"] - time.time()) < 60
    plain = created(client)
    assert (plain["temperature"], plain["top_p"]) == (0, 1)
    assert (plain["tool_choice"], plain["tools"]) == ("auto", [])
    assert plain["text"] == {"format": {"type": "text"}}


def test_an_answer_that_was_cut_is_incomplete(client):
    raw, events = created(client), streamed(client)
    assert raw["status"] == raw["output"][0]["status"] == "incomplete"
    assert raw["incomplete_details"] == {"reason": "max_output_tokens"}
    assert events[-1]["type"] == "response.incomplete"
    assert same(events[-1]["response"]) == same(raw)


SCRIPTS = {
    "Yes": ["message"],
    "": ["message"],
    "<think>\nHm\n</think>\n\nYes": ["reasoning", "message"],
    f"<think>Hm</think>{CALL}": ["reasoning", "function_call"],
    f"Yes\n{CALL}\n{CALL} no": ["message", "function_call", "function_call", "message"],
}
PARTED = ["content_part.added", "{}.delta", "{}.done", "content_part.done"]
STEPS = {
    "message": [step.format("output_text") for step in PARTED],
    "reasoning": [step.format("reasoning_text") for step in PARTED],
    "function_call": ["function_call_arguments.delta", "function_call_arguments.done"],
}


@pytest.mark.parametrize("text", SCRIPTS)
def test_events_tell_the_response_in_their_order(client, writes, text):
    writes(text)
    asks = {"tools": [PAINT], "text": JSON, "max_output_tokens": 200, "input": "?"}
    raw, events = created(client, **asks), streamed(client, **asks)
    assert [item["type"] for item in raw["output"]] == SCRIPTS[text]
    assert same(events[-1]["response"]) == same(raw)
    assert raw["status"] == "completed"

    kinds = [event["type"].removeprefix("response.") for event in events]
    runs = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    between = [
        step
        for kind in SCRIPTS[text]
        for step in ["output_item.added", *STEPS[kind], "output_item.done"]
    ]
    assert runs == ["created", "in_progress", *between, "completed"]

    for index, item in enumerate(events[-1]["response"]["output"]):
        mine = [event for event in events if event.get("output_index") == index]
        assert {event["item_id"] for event in mine[1:-1]} == {item["id"]}
        assert mine[-1]["item"] == item and item["status"] == "completed"
        whole = "".join(event["delta"] for event in mine if "delta" in event)
        assert whole == (item.get("arguments") or item["content"][0]["text"])
        added = {**item, "status": "in_progress"}
        added |= {"arguments": ""} if "arguments" in item else {"content": []}
        assert mine[0]["item"] == added


def test_the_stream_helper_ends_with_the_response(client, address, writes):
    writes("Yes")
    asks = GREEDY | {"input": "Hi", "text": JSON}
    told = client.responses.create(**asks)
    with client.responses.stream(**asks) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == told.output_text == "Yes"

    async def both() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            told = await client.responses.create(**asks)
            async with client.responses.stream(**asks) as stream:
                return [told, await stream.get_final_response()]

    for one in [final, *asyncio.run(both())]:
        left = {"parsed", "phase"}  # which the helper adds
        assert [
            {k: v for k, v in part.to_dict().items() if k not in left}
            for part in one.output[0].content
        ] == [part.to_dict() for part in told.output[0].content]
        assert one.usage.total_tokens == told.usage.total_tokens


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "paint"}])
def test_a_tool_is_called_where_it_must_be(client, choice):
    other = {"type": "function", "name": "wait", "parameters": None}
    asks = {"tools": [PAINT, other], "tool_choice": choice, "max_output_tokens": 90, "input": "?"}
    raw = created(client, **asks, parallel_tool_calls=False, extra_body=BRISK)
    (call,) = raw["output"]
    assert call["type"] == "function_call" and call["status"] == "completed"
    arguments = json.loads(call["arguments"])
    assert arguments == {} if call["name"] == "wait" else arguments["c"] in ("red", "blue")
    if choice != "required":
        assert call["name"] == "paint"


def test_no_more_than_one_tool_is_called_where_only_one_may_be(client, writes):
    writes(f"Yes\n{CALL}\n{CALL} no")
    asks = {"tools": [PAINT], "text": JSON, "max_output_tokens": 200, "input": "?"}
    asks["parallel_tool_calls"] = False
    raw, events = created(client, **asks), streamed(client, **asks)
    assert [item["type"] for item in raw["output"]] == ["message", "function_call"]
    assert raw["output"][1]["arguments"] == '{"c": "red"}' and raw["status"] == "completed"
    assert raw["usage"]["output_tokens"] < len(f"Yes\n{CALL}\n")
    assert same(events[-1]["response"]) == same(raw)


def test_no_tool_is_called_where_none_may_be(client, writes):
    writes(CALL)
    raw = created(client, tools=[PAINT], tool_choice="none", text=JSON, max_output_tokens=90)
    assert [item["type"] for item in raw["output"]] == ["message"]
    assert raw["output"][0]["content"][0]["text"] == CALL


class Color(pydantic.BaseModel):
    c: bool
    d: list[bool] = pydantic.Field(max_length=1)


def test_text_keeps_to_a_schema(client):
    asks = GREEDY | {"max_output_tokens": 60, "extra_body": BRISK}
    told = client.responses.parse(input="Hi", text_format=Color, **asks)
    assert isinstance(told.output_parsed, Color)
    assert told.status == "completed"


def test_messages_in_channels_are_items(client, writes, channeled):
    said = (("commentary", "So:"), ("analysis", "Hm"), ("final", "hi"))
    told = [f"<|channel|>{channel}<|message|>{text}" for channel, text in said]
    writes("<|end|><|start|>assistant".join(told))
    raw = created(client, input="?", text=JSON, max_output_tokens=200, reasoning={"effort": "low"})
    items = [(item["type"], item["content"][0]["text"]) for item in raw["output"]]
    assert items == [("message", "So:\n\n"), ("reasoning", "Hm"), ("message", "hi")]
    assert raw["reasoning"] == {"effort": "low", "summary": None}
    spent = len("".join(told)) + 2 * len("<|end|><|start|>assistant")
    not_thought = len("So:<|end|><|start|>assistant<|channel|>analysis<|message|>hi")
    details = raw["usage"]["output_tokens_details"]
    assert details["reasoning_tokens"] == spent - not_thought


def test_tokens_are_counted_by_what_they_are(client, writes):
    thought, answer = "<think>\nHm\n</think>\n\n", "Yes"
    writes(thought + answer)
    usage = created(client, input="count", text=JSON, max_output_tokens=60)["usage"]
    # A token of this model is a byte, and one more ends the answer.
    assert usage["output_tokens"] == len(thought + answer) + 1
    assert usage["output_tokens_details"] == {"reasoning_tokens": len(thought)}
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_what_was_read_lately_is_cached(client):
    long = "The same long beginning of a prompt. " * 4
    first, second = (created(client, input=long)["usage"] for _ in range(2))
    assert first["input_tokens"] == second["input_tokens"]
    cached = [u["input_tokens_details"]["cached_tokens"] for u in (first, second)]
    assert cached[0] < cached[1] < first["input_tokens"]


@pytest.mark.parametrize("text", ["Yes, é", "<think>Hm</think>\n\nYes", f"Yes{CALL}"])
def test_log_probabilities_are_those_of_the_text(client, writes, text):
    writes(text)
    asks = LOGPROBS | {"text": JSON, "tools": [PAINT], "max_output_tokens": 99, "input": "?"}
    raw, events = created(client, **asks), streamed(client, **asks)
    (content,) = next(i for i in raw["output"] if i["type"] == "message")["content"]
    said = b"".join(bytes(token["bytes"]) for token in content["logprobs"])
    assert said.decode() == content["text"] == text.split("</think>\n\n")[-1].split("<tool")[0]
    deltas = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
    assert [one for delta in deltas for one in delta] == content["logprobs"]
    assert all(len(token["top_logprobs"]) == 2 for token in content["logprobs"])
    assert not created(client)["output"][0]["content"][0]["logprobs"]


def test_log_probabilities_are_those_of_the_chat(client):
    told = created(client, **LOGPROBS)["output"][0]["content"][0]["logprobs"]
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], temperature=0, max_tokens=12,
        logprobs=True, top_logprobs=2,
    ).choices[0].logprobs.content  # fmt: skip
    assert told == [token.to_dict() for token in chat]


def test_thinking_that_the_prompt_opened_is_reasoning(client, thinking):
    raw, events = created(client), streamed(client)
    assert [item["type"] for item in raw["output"]] == ["reasoning"]
    assert raw["output"][0]["status"] == raw["status"] == "incomplete"
    assert raw["usage"]["output_tokens_details"]["reasoning_tokens"] == 12
    assert same(events[-1]["response"]) == same(raw)


def test_a_response_goes_back_as_input(client, writes, thinking):
    writes(f"Hm</think>Yes{CALL}")
    asks = GREEDY | {"text": JSON, "tools": [PAINT], "max_output_tokens": 99}
    given: list[Any] = [{"role": "user", "content": "?"}]
    told = client.responses.create(input=given, **asks)
    given += told.output
    call_id = told.output[-1].call_id
    given.append({"type": "function_call_output", "call_id": call_id, "output": "done"})
    after = client.responses.create(input=given, **GREEDY | {"max_output_tokens": 4})
    function = {"name": "paint", "arguments": '{"c": "red"}'}
    chat = client.chat.completions.create(
        model="tiny", temperature=0, max_tokens=4,
        messages=[
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "Yes", "reasoning_content": "Hm",
             "tool_calls": [{"id": call_id, "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": call_id, "content": "done"},
        ],
    )  # fmt: skip
    assert after.usage.input_tokens == chat.usage.prompt_tokens
    assert after.output[0].content[0].text == chat.choices[0].message.reasoning_content


def test_a_refusal_goes_back_as_text(client):
    said = {"type": "message", "role": "assistant", "content": "I cannot"}
    parts = [{"type": "output_text", "text": "I "}, {"type": "refusal", "refusal": "cannot"}]
    ways = (said, {**said, "content": parts})
    given = [[{"role": "user", "content": "?"}, way] for way in ways]
    plain, refused = (created(client, input=each)["usage"]["input_tokens"] for each in given)
    assert plain == refused
    with pytest.raises(openai.BadRequestError, match="only an assistant's may"):
        client.responses.create(**GREEDY, input=[{**ways[1], "role": "user"}])


def test_notes_name_the_fields_of_a_response(client):
    raw = client.responses.with_raw_response.create(
        **GREEDY | {"max_output_tokens": 5000}, input="Hi", tools=[PAINT], text=JSON,
        extra_body=BRISK,
    )  # fmt: skip
    assert "max_output_tokens 5000 clamped to" in raw.headers["warning"]
    assert "text.format holds the whole answer" in raw.headers["warning"]


def _asked(kind: str, **more: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": [{"type": kind, **more}]}]}


REFUSED = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    *[({"tools": [PAINT, {"type": kind}]}, "tools.1.type")
      for kind in ("web_search", "file_search", "computer", "code_interpreter", "mcp", "custom")],
    (_asked("input_image", image_url="data:,"), "input.0.content.0.type"),
    (_asked("input_file", file_id="file_1"), "input.0.content.0.type"),
    (_asked("input_audio", input_audio={}), "input.0.content.0.type"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type"),
    ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input.0.arguments"),
    ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input"),
    ({"input": []}, "input"),
    ({"input": "x" * LENGTH}, "input"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [PAINT], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
    ({"tools": [PAINT, PAINT]}, "tools"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 7}}}},
     "text.format"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"metadata": {"run": 7}}, "metadata.run"),
    ({"extra_body": {"n": 2}}, "n"),
    ({"extra_body": {"chat_template_kwargs": {"messages": 1}}}, "chat_template_kwargs"),
]  # fmt: skip


@pytest.mark.parametrize(("asks", "param"), REFUSED)
def test_what_cannot_be_done_is_refused_by_its_name(client, asks, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**GREEDY | {"input": "Hi"} | asks)
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize("value", ["NaN", '"\\ud800"'])
@pytest.mark.parametrize("field", ["tools", "text"])
def test_what_cannot_be_told_again_is_refused(address, value, field):
    odd = f'{{"type": "object", "title": {value}}}'
    shape = {
        "tools": '[{"type": "function", "name": "f", "parameters": %s}]',
        "text": '{"format": {"type": "json_schema", "name": "f", "schema": %s}}',
    }[field]
    body = f'{{"model": "tiny", "input": "?", "tool_choice": "none", "{field}": {shape % odd}}}'
    asks = urllib.request.Request(
        f"{address}/v1/responses", body.encode(), {"content-type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(asks)
    with caught.value as refused:
        told = json.load(refused)["error"]
    assert refused.code == 400
    assert told["param"] == field or told["message"].startswith(field)


class Failing:
    """A matcher that fails after some tokens."""

    left = 3

    def copy(self) -> "Failing":
        return Failing()

    def mask(self, row: Any) -> None:
        row[:] = 0
        row[ord("y") // 32] = 1 << ord("y") % 32

    def accept(self, token: int) -> None:
        self.left -= 1
        if not self.left:
            raise BadRequest("it broke")


def test_a_failure_is_told(client, server, monkeypatch):
    async def matcher(spec: Any, param: str, thinking: str = "") -> Any:
        return Failing()

    monkeypatch.setattr(server.host, "matcher", matcher)
    events = streamed(client, text=JSON)
    assert events[-1]["type"] == "response.failed"
    response = events[-1]["response"]
    assert response["status"] == "failed"
    assert response["error"] == {"code": "server_error", "message": "it broke"}
    assert response["output"][0]["status"] == "incomplete"
    with pytest.raises(openai.InternalServerError, match="it broke"):
        client.responses.create(input="Hi", text=JSON, **GREEDY)


def test_a_stream_that_breaks_ends_with_an_error(client, server, monkeypatch, caplog):
    def breaks(self: Any, step: Any) -> Any:
        raise RuntimeError("a secret")

    monkeypatch.setattr(served._Whole, "_told", breaks)
    events = streamed(client)
    assert events[-1]["type"] == "error" and events[-1]["code"] == "server_error"
    assert "secret" not in str(events) and "a secret" in caplog.text
    until = time.monotonic() + 20
    while server.host.service.open and time.monotonic() < until:
        time.sleep(0.02)
    assert not server.host.service.open


def test_nothing_is_left_when_the_client_goes(client, server):
    asks = GREEDY | {"input": "Hi", "max_output_tokens": 200}
    with client.responses.create(**asks, stream=True) as stream:
        assert next(iter(stream)).type == "response.created"
        assert server.host.service.open
    until = time.monotonic() + 20
    while server.host.service.open and time.monotonic() < until:
        time.sleep(0.02)
    assert not server.host.service.open
