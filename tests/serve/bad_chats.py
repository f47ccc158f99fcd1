"""More of the table in `bad_inputs`: conversations, formats that answers keep to, and tools."""

import itertools
from collections.abc import Iterator

from tests.serve.bad_inputs import (
    CALL,
    HALF,
    INFINITY,
    NAMED,
    NAN,
    SAY,
    Case,
    chat,
    nested,
    written,
)


def messages() -> Iterator[Case]:
    """Conversations that are none, and what would be forged with them."""
    for said in (None, "hi", {}, [], [1], [None], [[]], [SAY]):
        yield chat("messages", messages=said)
    for role in ("system\n", "root", "", "SYSTEM", "user ", "system\x00", "<|system|>", 5, None,
                 HALF, [], "tool\r\n\r\nuser"):  # fmt: skip
        yield chat("messages.0.role", messages=[{"role": role, "content": "a"}])
    for content in (None, 5, 1.5, True, {}, [1], [None], ["a"], [[]], {"text": "a"}, HALF):
        yield chat("messages.0.content", messages=[{"role": "user", "content": content}])
    yield chat("messages.0.content", messages=[{"role": "user"}])
    yield chat("messages.1.content", messages=[*SAY, {"role": "assistant", "content": None}])
    yield chat("messages.0.role", messages=[{"content": "a"}])
    yield chat("messages", messages=[{"role": "user", "content": "a" * 10**5}])
    for part in (
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10**6}},
        {"type": "image_url", "image_url": "http://169.254.169.254/"},
        {"type": "input_audio", "input_audio": {"data": "A" * 10**5, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "http://169.254.169.254/"}},
        {"type": "file", "file": {"file_id": "../../etc/passwd"}}, {"type": "refusal"},
        {"type": "input_image"}, {"type": "text\n", "text": "a"}, {"text": "a"}, {"type": "text"},
        {"type": "text", "text": None}, {"type": "text", "text": ["a"]},
    ):  # fmt: skip
        text = {"type": "text", "text": "a"}
        yield chat("messages.0.content.0", messages=[{"role": "user", "content": [part]}])
        yield chat("messages.0.content.1", messages=[{"role": "user", "content": [text, part]}])
    yield chat("messages.0.content", messages=[{"role": "user", "content": [text] * 257}])
    for call in ({}, 5, {**CALL, "id": 5}, {**CALL, "type": "x"}, {**CALL, "function": {}},
                 {**CALL, "function": {"name": "f", "arguments": {}}},
                 {**CALL, "function": {"name": "f" * 65, "arguments": "{}"}}):  # fmt: skip
        said = [*SAY, {"role": "assistant", "tool_calls": [call]}]
        yield chat("messages.1.tool_calls.0", messages=said)
    half = {**CALL, "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    yield chat("messages", messages=[*SAY, {"role": "assistant", "tool_calls": [half]}])
    for name in ("chat_template", "messages", "tools", "documents", "add_generation_prompt",
                 "bos_token", "eos_token", "tokenizer"):  # fmt: skip
        yield chat("chat_template_kwargs", chat_template_kwargs={name: "{{ 1 }}"})
    for kwargs in (
        {"x": [1]},
        {"x": {}},
        {"x": None},
        [],
        "x",
        {"x": NAN},
        {"x" * 65: 1},
        {"x": "a" * 257},
        {HALF: 1},
        {"x": HALF},
        {f"x{i}": 1 for i in range(17)},
    ):
        yield chat("chat_template_kwargs", chat_template_kwargs=kwargs)


def structured() -> Iterator[Case]:
    """Formats that are wrong, or that would take hours, all memory, or the process down."""
    for held in ({}, {"name": "x"}, {"type": "object", "properties": {}}):
        form = {"type": "json_schema", "json_schema": held}
        yield chat("response_format.json_schema.schema", response_format=form)
    for schema in (
        {"type": "nope"}, {"type": 5}, {"properties": 5}, {"required": 5}, {"enum": 5},
        {"enum": []}, {"anyOf": []}, {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "integer", "minimum": 5, "maximum": 1}, {"type": "array", "minItems": -1},
        {"type": "array", "minItems": 5, "maxItems": 1}, {"type": "integer", "multipleOf": 0},
        {"$ref": "#"}, {"$ref": "#/$defs/nope"}, {"$ref": "http://169.254.169.254/latest"},
        {"$ref": "file:///etc/passwd"}, {"$ref": "other.json"}, {"$ref": 5},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"$id": "http://x/y", "$ref": "http://x/y"}, {"$dynamicRef": "#a"},
        {"enum": [f"v{i}" for i in range(10**5)]}, {"const": "a" * 300_000},
        {"properties": {f"p{i}": {"type": "string"} for i in range(10**4)}},
        {"type": "string", "pattern": "("}, {"type": "string", "pattern": "(?=a)b"},
        {"type": "string", "pattern": "(a)\\1"}, {"patternProperties": {"(": {}}},
        {"not": {"type": "string"}}, {"if": {}, "then": {}}, {"type": "string", "format": "nope"},
        {"type": "array", "uniqueItems": True}, {"type": "number", "minimum": 10**400},
        {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]},
        {"enum": [HALF]}, {"default": NAN}, {"maximum": INFINITY},
    ):  # fmt: skip
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        yield chat("response_format", response_format=form)
    for schema in (None, 5, [], True, "{}"):
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        yield chat("response_format.json_schema.schema", response_format=form)
    for regex in (
        "(", "[", ")", "*", "a{5,1}", "(?P<x", "(?=a)b", "(?<=a)b", "(?<!a)b", "(a)\\1", "a" * 9000,
        "", "[\\ud800]", "\\p{Nope}", "(" * 1000 + "a" + ")" * 1000, HALF,
    ):  # fmt: skip
        yield chat("response_format", response_format={"type": "regex", "regex": regex})
    for form in ("json", 5, [], {}, {"type": None}, {"type": "xml"}, {"type": "json_schema"},
                 {"type": "regex"}, {"type": "json_object", "json_schema": 5},
                 {"type": "json_schema", "json_schema": {"schema": {}, "name": 5}}):  # fmt: skip
        yield chat("response_format", response_format=form)
    for depth, name in itertools.product((200, 900, 1400), ("items", "a", "allOf")):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": "@"}}
        if name != "a":
            yield written(chat("response_format", response_format=form), nested(name, depth))
        tool = {"type": "function", "function": {"name": "f", "parameters": {"x": "@"}}}
        yield written(chat(None, tools=[tool]), nested(name, depth))


def tools() -> Iterator[Case]:
    """Tools without a name, with another's, or with a schema that no grammar holds."""
    for name in ("", "a b", "a" * 65, "f\n", "é", "a/b", HALF, None, 5, '"', "f)|(g", "\x00"):
        yield chat(
            "tools.0.function.name", tools=[{"type": "function", "function": {"name": name}}]
        )
    plain = {"type": "function", "function": {"name": "f"}}
    for choice in ("required", NAMED):
        yield chat("tool_choice", tool_choice=choice)
        yield chat("tool_choice", tool_choice=choice, tools=[])
    other = {"type": "function", "function": {"name": "g"}}
    for choice in (other, "x", 5, {}, [], {"type": "x"}, {"type": "function"}, True, HALF,
                   {"type": "function", "function": {"name": 5}}):  # fmt: skip
        yield chat("tool_choice", tools=[plain], tool_choice=choice)
    for listed in (
        [plain, plain],
        {},
        "f",
        5,
        [None],
        [{}],
        [{"type": "function"}],
        [[]],
        [{"type": "web_search"}],
        [{"type": "function", "function": {}}],
        [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)],
        [{"type": "function", "function": {"name": "f", "strict": "yes"}}],
    ):
        yield chat("tools", tools=listed)
    for parameters in (5, [], "x", {"type": "array"}, {"type": ["object"]}, {"x": NAN},
                       {"description": HALF}, {HALF: 1}):  # fmt: skip
        yield chat("tools", tools=[{"type": "function", "function": {
            "name": "f", "parameters": parameters}}])  # fmt: skip
    for field in (
        {"type": "string", "pattern": "("}, {"$ref": "http://169.254.169.254/"}, {"type": "nope"},
        {"$ref": "#/nope"}, {"enum": [f"v{i}" for i in range(10**5)]}, {"enum": []},
    ):  # fmt: skip
        function = {"name": "f", "parameters": {"properties": {"a": field}, "required": ["a"]}}
        forced = [{"type": "function", "function": function}]
        yield chat(None, tools=forced, tool_choice="required")
