import itertools
import json
import random
from collections.abc import Iterable
from typing import Any

import jsonschema_rs
import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage
from openai.types.chat.chat_completion_chunk import ChoiceDelta

from ropewalk.serve import tools
from ropewalk.serve.deltas import Arguments, Call, Content, Delta, Reasoning, merged, message
from ropewalk.serve.deltas import openai as openai_delta
from ropewalk.serve.reasoning import Channels, Thinking, ThinkTags
from ropewalk.serve.tool_choice import Choice, ToolError, choose
from ropewalk.serve.tool_choice import grammar as grammar_of

TAGS, BARE, LIST, NAMED = tools.Tags(), tools.Bare(), tools.Brackets(), tools.NamedBrackets()
TO = tools.Recipients()
FORMATS = [TAGS, BARE, LIST, NAMED, TO]
NAMES = ("get", "get_weather", "ns.f-1")
MARKERS = sorted({marker for which in (ThinkTags, Channels, *FORMATS) for marker in which.markers})


def parse(
    form: tools.Format | None,
    pieces: Iterable[str],
    names: tuple[str, ...] = NAMES,
    thinking: Thinking | None = None,
) -> list[Delta]:
    """The deltas, with ids that do not depend on chance."""
    parser = tools.Parser(form, names, thinking)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    assert parser.calls == sum(isinstance(delta, Call) for delta in deltas)
    return merged(Call(d.index, "", d.name) if isinstance(d, Call) else d for d in deltas)


def summary(deltas: Iterable[Delta]) -> tuple[str | None, list[tuple[str, str]]]:
    answer = message(deltas)
    functions = [call["function"] for call in answer.get("tool_calls", [])]
    return answer["content"], [(f["name"], f["arguments"]) for f in functions]


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


GET = '{"name": "get", "arguments": {"a": "}\\"<"}}'
ARGUMENTS = '{"a": "}\\"<"}'


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (TAGS, f"Well.\n<tool_call>\n{GET}\n</tool_call>", "Well.", [("get", ARGUMENTS)]),
        (TAGS, f"\n<tool_call>{GET}</tool_call>\n<tool_call>{GET}", None, [("get", ARGUMENTS)] * 2),
        (TAGS, '<tool_call>{ "arguments": {"b": [1]}, "name": "get"}</tool_call> ', None,
         [("get", '{"b": [1]}')]),
        (TAGS, '<tool_call>{"name": "get"}</tool_call>', None, [("get", "{}")]),
        (TAGS, '<tool_call>{"name": "get", "arguments": {}\n</tool_call>', None, [("get", "{}")]),
        (TAGS, '<tool_call>{"name": "get", "why": [1, "x"], "arguments": {}}</tool_call>', None,
         [("get", "{}")]),
        (TAGS, f"<tool_call>{GET}\n{GET}\n<tool_call>{GET}</tool_call> So.", "So.",
         [("get", ARGUMENTS)] * 3),
        (TAGS, f"<<tool_call>{GET}</tool_call>\nSo.", "<\nSo.", [("get", ARGUMENTS)]),
        (TAGS, '<tool_call>{"name": "get", "arguments": {"a": 1', None, [("get", '{"a": 1')]),
        (TAGS, '<tool_call>{"name": "get", "arguments": {"a": [1}', "}", [("get", '{"a": [1')]),
        (BARE, '{"name": "get", "parameters": {"a": 1}}', None, [("get", '{"a": 1}')]),
        (BARE, '\n<|python_tag|>{"type": "function", "name": "get", "parameters": {}}; {"name":'
         ' "get_weather", "parameters": {}}', None, [("get", "{}"), ("get_weather", "{}")]),
        (LIST, f"Well.[TOOL_CALLS] [{GET}, {GET}] So.", "Well. So.", [("get", ARGUMENTS)] * 2),
        (LIST, '[TOOL_CALLS][{"name":"get","arguments":{},"id":"abcdefghi"}]', None,
         [("get", "{}")]),
        (LIST, '[TOOL_CALLS]get{"a": 1}', None, [("get", '{"a": 1}')]),
        (NAMED, '[TOOL_CALLS]get[ARGS]{"a": 1}[TOOL_CALLS]ns.f-1[ARGS]{}', None,
         [("get", '{"a": 1}'), ("ns.f-1", "{}")]),
        (NAMED, '[TOOL_CALLS]get_weather[CALL_ID]a1B2[ARGS]{"a": 1}', None,
         [("get_weather", '{"a": 1}')]),
        (NAMED, f"[TOOL_CALLS] {GET}", None, [("get", ARGUMENTS)]),
        (TO, '<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"a": 1}<|call|>',
         None, [("get", '{"a": 1}')]),
        (TO, ' to=functions.get<|channel|>commentary json<|message|>{"a": 1}', None,
         [("get", '{"a": 1}')]),
        (TO, '<|channel|>commentary to=functions.get code<|message|>{"a": 1}', None,
         [("get", '{"a": 1}')]),
        (TO, "So.<|start|>assistant<|channel|>analysis to=functions.ns.f-1<|message|>{}", "So.",
         [("ns.f-1", "{}")]),
        (TO, '<|start|>assistant to=functions.get<|channel|>commentary<|message|>\n{"a": [1}',
         "}", [("get", '{"a": [1')]),
    ],
)  # fmt: skip
def test_calls_as_models_write_them(
    form: tools.Format, text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    assert summary(parse(form, [text])) == (content, calls)
    assert parse(form, text) == parse(form, [text])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (TAGS, '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
        (TAGS, '<tool_call>\n{"name": "get_", "arguments": {}}\n</tool_call>'),
        (TAGS, '<tool_call>{"name": "get", "arguments": "{}"}</tool_call>'),
        (TAGS, '<tool_call>{"arguments": {}}</tool_call>'),
        (TAGS, '\n<tool_call> and </tool_call>\n'),
        (TAGS, '<tool_call>{"name": "get"'),
        (TAGS, '<tool_call>{"arguments": {"a": "<tool_call>'),
        (TAGS, GET),
        (TAGS, "<tool_call>\n<function=get>\n</function>\n</tool_call>"),
        (BARE, '{"title": "x", "name": "get", "parameters": {}}'),
        (BARE, '{"name": "get"}'),
        (BARE, f"Well. {GET}"),
        (BARE, '<|python_tag|>print("x")'),
        (BARE, '<|python_tag|>get.call(a="x")'),
        (LIST, "[TOOL_CALLS] []"),
        (LIST, "[TOOL_CALLS] [1]"),
        (NAMED, "[TOOL_CALLS]get[ARGS]"),
        (NAMED, "[TOOL_CALLS]got[ARGS]{}"),
        (NAMED, "[TOOL_CALLS]get[1]{}"),
        (TO, "<|channel|>commentary to=functions.got json<|message|>{}<|call|>"),
        (TO, "<|channel|>commentary to=python<|message|>print()"),
        (TO, "<|channel|>commentary to=functions.get<|message|>1"),
        (TO, " to=functions.get json<|message|>{}"),
        (None, f"\n<tool_call>{GET}</tool_call>\n"),
    ],
)  # fmt: skip
def test_what_is_no_call_is_content_to_the_letter(form: tools.Format | None, text: str) -> None:
    assert parse(form, [text]) == [Content(text)]
    assert parse(form, text) == [Content(text)]


def test_what_follows_a_call_and_is_none_is_content() -> None:
    text = f'<tool_call>{GET}, {{"name": "no"}}</tool_call>'
    assert summary(parse(TAGS, text)) == (', {"name": "no"}</tool_call>', [("get", ARGUMENTS)])
    text = '{"name": "get", "parameters": {}}; {"city": 1}'
    assert summary(parse(BARE, text)) == ('; {"city": 1}', [("get", "{}")])


def written(form: tools.Format, calls: list[tuple[str, Any]]) -> str:
    """The calls as a grammar has them written."""
    before, between, after = map("".join, form.texts)
    spelt = [
        "".join(begin) + json.dumps(arguments) + "".join(end)
        for name, arguments in calls
        for begin, end in [form.call(name)]
    ]
    return before + between.join(spelt) + after if calls else ""


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(MARKERS),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(), VALUES)), max_size=3)
PLACES = st.lists(st.integers(0, 10_000))
CHANNEL, NEXT = "<|channel|>", "<|end|><|start|>assistant"
THINKING = st.sampled_from([None, ThinkTags(False), ThinkTags(True), Channels()])


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: type(form).__name__)
@given(calls=CALLS, places=PLACES, thought=st.booleans(), said=st.sampled_from(["", "So, <x> [y]"]))
def test_what_is_written_is_read_however_it_is_cut(
    form: tools.Format, calls: list[tuple[str, Any]], places: list[int], thought: bool, said: str
) -> None:
    said = "" if form is BARE else said
    calls = calls if form.several else calls[:1]
    before, thinking = "<think>\nWell </thin\n</think>\n\n" * thought + said, ThinkTags(False)
    if form is TO:
        thinking = Channels()
        before = f"{CHANNEL}analysis<|message|>Well </thin{NEXT}" * thought
        before += f"{CHANNEL}commentary<|message|>{said}{NEXT}" if said else ""
    deltas = parse(form, cut(before + written(form, calls), places), thinking=thinking)
    expected: list[Delta] = [Reasoning("Well </thin")] if thought else []
    said += "\n\n" if form is TO and said and not calls else ""
    expected += [Content(said)] if said else []
    for i, (name, arguments) in enumerate(calls):
        expected += [Call(i, "", name), Arguments(i, json.dumps(arguments))]
    assert deltas == expected


FRAGMENTS = st.sampled_from([
    *MARKERS, *NAMES, GET, '{"name": "', '"get"', '", "arguments": ', '"arguments":', '"id": 1, ',
    '"parameters": {}', *'{}[],;:"\\< \na', "</",
    " to=functions.get", "commentary", "assistant", "json",
])  # fmt: skip


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: type(form).__name__)
@settings(max_examples=300)
@given(pieces=st.lists(FRAGMENTS, max_size=20), thinking=THINKING)
def test_any_text_is_read_the_same_however_it_is_cut(
    form: tools.Format, pieces: list[str], thinking: Thinking | None
) -> None:
    text = "".join(pieces)
    whole = parse(form, [text], thinking=thinking)
    assert parse(form, pieces, thinking=thinking) == whole
    assert parse(form, text, thinking=thinking) == whole
    assert parse(form, pieces, names=("unknown",)) == ([Content(text)] if text else [])


def test_no_more_is_held_back_than_may_be_a_call() -> None:
    parser = tools.Parser(TAGS, NAMES)
    assert parser.feed("a <") == [Content("a")]
    assert parser.feed("b") == [Content(" <b")]
    assert parser.feed('\n<tool_call>\n{"name": "get') == []
    assert parser.feed("x") == [Content('\n<tool_call>\n{"name": "getx')]
    parser.feed('<tool_call>\n{"name": "get", "arguments":')
    begin, arguments = parser.feed(' {"a": "<')
    assert isinstance(begin, Call) and (begin.index, begin.name) == (0, "get")
    assert arguments == Arguments(0, '{"a": "<')
    assert parser.feed('/"}') == [Arguments(0, '/"}')]
    assert parser.feed("}\n</tool_call>\n\n") == []
    assert parser.feed("So") == [Content("\n\nSo")]
    assert parser.finish() == []


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: type(form).__name__)
def test_one_call_may_be_the_only_one(form: tools.Format) -> None:
    """It ends there, as soon as it is whole and however the text is cut."""
    text = written(form, [("get", {"a": 1}), ("get_weather", {})][: 1 + form.several]) + " So."
    for pieces in ([text], text):
        parser = tools.Parser(form, NAMES, None, single=True)
        deltas, read = [], ""
        for piece in pieces:
            deltas += parser.feed(piece)
            read += piece
            if parser.ended:
                break
        assert parser.ended and summary(deltas) == (None, [("get", '{"a": 1}')])
        assert parser.feed(" So.") == parser.finish() == []
    assert "get_weather" not in read
    parser = tools.Parser(form, NAMES, None, single=True)
    assert parser.feed("So. ") == [Content("So.")] and not parser.ended


def test_deltas_and_messages_are_those_of_openai() -> None:
    text = f"<think>Well</think>So <tool_call>{GET}</tool_call><tool_call>{GET}</tool_call>"
    parser = tools.Parser(TAGS, NAMES, ThinkTags(False))
    deltas = [*parser.feed(text), *parser.finish()]
    chunks = [ChoiceDelta.model_validate(openai_delta(delta), strict=True) for delta in deltas]
    answer = ChatCompletionMessage.model_validate(message(deltas), strict=True)
    assert "".join(chunk.content or "" for chunk in chunks) == answer.content == "So"
    begun = [call for chunk in chunks for call in chunk.tool_calls or [] if call.id]
    assert [call.id for call in begun] == [call.id for call in answer.tool_calls or []]
    assert len({call.id for call in begun}) == 2


@pytest.mark.parametrize(
    ("form", "template"),
    [
        (TAGS, "{{ '<tool_call>\n' }}{{ call | tojson }}{{ '\n</tool_call>' }}"),
        (BARE, "{{ '<|python_tag|>' + call.code }}"),
        (BARE, 'Answer with {"name": ..., "parameters": dictionary of its arguments}'),
        (LIST, "{{ '[TOOL_CALLS] [' }}"),
        (NAMED, "{{ '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}"),
        (None, "{{ '<tool_call>\n<function=' + name + '>' }}"),
        (None, "{{ '<tool_call>' + name }}<arg_key>"),
        (None, "{{ message.content }}"),
        (None, None),
    ],
)
def test_the_template_tells_how_calls_are_written(
    form: tools.Format | None, template: str | None
) -> None:
    assert type(tools.detect(template)) is type(form)


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 3, "format": "of a city"},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 2},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get"}},
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_which_functions_may_be_called() -> None:
    everything = choose(TOOLS)
    assert list(everything.functions) == ["get", "get_weather"] and not everything.forced
    assert choose(TOOLS, "auto", False) == Choice(everything.functions, False, False)
    assert choose(TOOLS, "required") == Choice(everything.functions, True, True)
    assert choose(TOOLS, "none") == choose(None) == Choice({})
    assert choose(TOOLS, named("get_weather")) == Choice({"get_weather": SCHEMA}, True, False)


@pytest.mark.parametrize(
    ("given_tools", "choice", "says"),
    [
        (TOOLS, named("other"), "'other'.*2 tools: get, get_weather"),
        (TOOLS, "any", "'any' is not"),
        (TOOLS, {"function": {"name": "get"}}, "is not"),
        (None, "required", "there are 0 tools"),
        (TOOLS + TOOLS[:1], None, "two tools have the name 'get'"),
        ([{"type": "custom", "custom": {}}], None, "a tool must be"),
        ([named('a"b')], None, "its name of letters"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}], None,
         "parameters of 'f'"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_served(given_tools: Any, choice: Any, says: str) -> None:
    with pytest.raises(ToolError, match=says):
        choose(given_tools, choice)


class Vocabulary:
    """Bytes, an end, and the markers as special tokens."""

    eos_token_id, bos_token_id = 256, None
    special_token_ids = range(256, 257 + len(MARKERS))
    tokens = [bytes([i]) for i in range(256)] + [b"<end>", *(m.encode() for m in MARKERS)]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


TOKENIZER = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary()))
IDS = {marker: 257 + i for i, marker in enumerate(MARKERS)}


def walk(grammar: str, seed: int) -> str:
    """What a model could write under the grammar, by chance, up to its end."""
    assert not llguidance.LLMatcher.validate_grammar_with_warnings(grammar, TOKENIZER)[0]
    matcher = llguidance.LLMatcher(TOKENIZER, grammar)
    chance, text = random.Random(seed), b""
    while not matcher.is_stopped():
        mask = matcher.compute_logit_bias()
        allowed = [i for i, bias in enumerate(mask) if bias]
        ends = [i for i in allowed if i >= 256 or i in b"}\"'<,"]
        token = chance.choice(ends if ends and chance.random() < 0.5 else allowed)
        assert matcher.consume_token(token), matcher.get_error()
        text += b"" if token == 256 else Vocabulary.tokens[token]
    return text.decode()


@pytest.mark.parametrize("ids", [IDS, {}], ids=["special", "plain"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: type(form).__name__)
def test_what_a_grammar_lets_through_is_calls_that_fit(
    form: tools.Format, ids: dict[str, int]
) -> None:
    choice = choose(TOOLS, "required")
    grammar = grammar_of(form, choice, None, ids)
    found: list[tuple[str, str]] = []
    for seed in range(12):
        content, calls = summary(parse(form, [walk(grammar, seed)]))
        assert content is None and calls
        found += calls
        for name, arguments in calls:
            jsonschema_rs.validate(dict(choice.functions[name]), json.loads(arguments))
    assert {name for name, _ in found} == {"get", "get_weather"} and len(found) >= 12 + form.several


def accepts(grammar: str, text: str, ids: dict[str, int]) -> bool:
    matcher = llguidance.LLMatcher(TOKENIZER, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens: list[int] = []
    while text:
        marker = next((m for m in ids if text.startswith(m)), None)
        part = marker or text[0]
        tokens += [ids[marker]] if marker else list(part.encode())
        text = text[len(part) :]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("ids", [IDS, {}], ids=["special", "plain"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: type(form).__name__)
def test_a_grammar_allows_what_the_choice_does(form: tools.Format, ids: dict[str, int]) -> None:
    one = written(form, [("get_weather", {"city": "Rom", "days": [1, 2]})])
    both = written(form, [("get", {}), ("get_weather", {"city": "Rom"})])
    some, single = choose(TOOLS, "required"), choose(TOOLS, named("get_weather"))
    assert accepts(grammar_of(form, some, None, ids), both, ids) == form.several
    assert not accepts(grammar_of(form, some, None, ids), "So." + one, ids)
    assert accepts(grammar_of(form, single, None, ids), one, ids)
    assert not accepts(grammar_of(form, single, None, ids), both, ids)
    assert not accepts(grammar_of(form, single, None, ids), written(form, [("get", {})]), ids)


@pytest.mark.parametrize("ids", [IDS, {}], ids=["special", "plain"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: type(form).__name__)
def test_a_grammar_lets_think_before_a_call(form: tools.Format, ids: dict[str, int]) -> None:
    one = written(form, [("get_weather", {"city": "Rom", "days": [1, 2]})])
    single = choose(TOOLS, named("get_weather"))
    if form is TO:
        grammar = grammar_of(form, single, Channels(), ids)
        analysis = "<|channel|>analysis<|message|>Well, é <|en\n<|end|><|start|>assistant"
        assert accepts(grammar, one, ids) and accepts(grammar, analysis + one, ids)
        assert not accepts(grammar, analysis.replace("analysis", "final") + one, ids)
        return
    thought = "<think>\nWell, é <thi\n</think>"
    assert not accepts(grammar_of(form, single, None, ids), thought + one, ids)
    assert accepts(grammar_of(form, single, ThinkTags(False), ids), one, ids)
    assert accepts(grammar_of(form, single, ThinkTags(False), ids), thought + "\n\n" + one, ids)
    assert accepts(grammar_of(form, single, ThinkTags(True), ids), thought[7:] + one, ids)
    assert not accepts(grammar_of(form, single, ThinkTags(True), ids), one, ids)
