import json
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from ropewalk.serve import grammar
from ropewalk.serve.grammar import Busy, GrammarError, Grammars, Lark, Matcher, Regex, Schema, Spec
from ropewalk.text import bpe
from ropewalk.text.interface import Tokenizer
from ropewalk.text.tokenizer import SentencePieceTokenizer, load
from tests.text.pieces import sentencepiece_model

SAMPLE = [
    'To be, or not to be: that is the question. {"name": "Hamlet", "acts": [1, 2.5]}\n',
    'naïve café, 日本語 and 😀 the end.\n{"a": true, "b": null} 12345\n',
] * 20
BEYOND = 100  # ids that the model has and the tokenizer has not
KINDS = ["byte", "bpe", "sentencepiece"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    found = [load("byte"), bpe.train(SAMPLE, 400)]
    model = sentencepiece_model(tmp_path_factory.mktemp("sentencepiece"), SAMPLE, 350)
    found.append(SentencePieceTokenizer(model, "sp"))
    return dict(zip(KINDS, found, strict=True))


@pytest.fixture(scope="module")
def kinds(tokenizers: dict[str, Tokenizer]) -> Iterator[dict[str, Grammars]]:
    yield {kind: Grammars(one, one.vocab_size + BEYOND) for kind, one in tokenizers.items()}


@pytest.fixture(scope="module")
def plain(kinds: dict[str, Grammars]) -> Grammars:
    return kinds["byte"]


def allowed(matcher: Matcher, words: int | None = None) -> list[int]:
    out = np.full(words or matcher._grammars.mask_words, 2**32 - 1, np.uint32)
    matcher.mask(out)
    return np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little")).tolist()


def walk(matcher: Matcher, tokenizer: Tokenizer, seed: int) -> str:
    """What a model could write by chance, in a hurry to come to an end."""
    chance, ids = random.Random(seed), []
    pieces = tokenizer.vocabulary.pieces
    while True:
        may = allowed(matcher)
        assert max(may) < tokenizer.vocab_size
        ends = [i for i in may if i in tokenizer.eos_ids or pieces[i].strip() in (b'"', b"}", b"]")]
        token = chance.choice(ends if ends and chance.random() < 0.5 else may)
        assert matcher.done <= (token in tokenizer.eos_ids)
        matcher.accept(token)
        if token in tokenizer.eos_ids:
            return tokenizer.decode(ids)
        ids.append(token)


SCHEMAS: dict[str, Any] = {
    "any": {"type": "object"},
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["é", 2, None]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "number"},
                    "sons": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "either": {
        "oneOf": [
            {"type": "object", "properties": {"is": {"const": "a"}}, "required": ["is"]},
            {"type": "object", "properties": {"is": {"const": "b"}}, "required": ["is"]},
        ]
    },
    "told otherwise": {"type": "integer", "x-guidance": {"item_separator": "(x", "lenient": True}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_a_schema_lets_through_fits_it(
    kinds: dict[str, Grammars], tokenizers: dict[str, Tokenizer], kind: str, name: str
) -> None:
    for seed in range(10):
        text = walk(kinds[kind].compile(Schema(SCHEMAS[name])), tokenizers[kind], seed)
        # an exponent may be beyond what Python holds
        value = json.loads(text, parse_float=lambda number: 0.5)
        jsonschema_rs.validate(SCHEMAS[name], value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "pattern", [r"(a|bc)+[0-9]{2,4}", r"the (end|question)\.?", r"[^a-y]{1,5}é"]
)
def test_whatever_a_regular_expression_lets_through_matches_it(
    kinds: dict[str, Grammars], tokenizers: dict[str, Tokenizer], kind: str, pattern: str
) -> None:
    for seed in range(10):
        text = walk(kinds[kind].compile(Regex(pattern)), tokenizers[kind], seed)
        assert re.fullmatch(pattern, text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [Regex('(?s:\\{"name": "Hamlet".*)'), Schema({"type": "object"})])
def test_text_may_be_written_as_the_tokenizer_encodes_it(
    kinds: dict[str, Grammars], tokenizers: dict[str, Tokenizer], kind: str, spec: Spec
) -> None:
    """With a space before it where the tokenizer puts one, and its own choice of ids that share
    their bytes."""
    tokenizer, matcher = tokenizers[kind], kinds[kind].compile(spec)
    text = '{"name": "Hamlet", "acts": [1, 2.5], "é": "日"}'
    for token in tokenizer.encode(text):
        assert token in allowed(matcher)
        matcher.accept(token)
    assert tokenizer.eos_ids[0] in allowed(matcher)


def test_special_tokens_stand_only_where_a_grammar_names_them(plain: Grammars) -> None:
    assert not {256, 258}.intersection(allowed(plain.compile(Regex("(?s:.*)"))))
    matcher = plain.compile(Lark('start: "a" <|pad|> j\nj: %json {"const": 7}'))
    for token in (ord("a"), 258, ord("7"), 257):
        assert allowed(matcher) == [token]
        matcher.accept(token)


def test_after_the_end_only_the_end_may_follow(plain: Grammars) -> None:
    matcher = plain.compile(Regex("ab?"))
    assert allowed(matcher) == [ord("a")]
    matcher.accept(ord("a"))
    assert allowed(matcher) == [ord("b"), 257] and not matcher.done
    other = matcher.copy()
    matcher.accept(ord("b"))
    assert matcher.done and not other.done and allowed(other) == [ord("b"), 257]
    for one in (matcher, other):
        for _ in range(2):
            one.accept(257)
            assert one.done and allowed(one) == [257]
    with pytest.raises(GrammarError, match="cannot be held to its grammar"):
        matcher.accept(ord("b"))


def test_a_model_may_have_fewer_ids_than_its_tokenizer(
    tokenizers: dict[str, Tokenizer],
) -> None:
    small = Grammars(tokenizers["bpe"], 390)
    with pytest.raises(ValueError, match=r"4-byte words \[13\]"):
        allowed(small.compile(Regex(".*")), 14)
    with pytest.raises(GrammarError, match="no id that ends an answer"):
        Grammars(tokenizers["byte"], 200)


def test_blanks_come_to_an_end(plain: Grammars) -> None:
    """A space, or a new line and its indentation, between two parts of JSON."""
    for written in ("{ ", "{\n" + " " * 32, '{"a": 1,\r\n\t"b" '):
        matcher = plain.compile(Schema({"type": "object"}))
        for char in written:
            matcher.accept(ord(char))
        assert not {*map(ord, " \n\r\t")} & {*allowed(matcher)}


def references(length: int, link: Any) -> dict[str, Any]:
    """A schema whose every definition refers to the next one."""
    chain = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**chain, f"d{length}": {"type": "string"}}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE: dict[str, tuple[Spec, str]] = {
    "never ends": (Schema({"type": "integer", "multipleOf": 99400891}), "more than 0.4 s"),
    "many at once": (
        Schema({"allOf": [{"type": "string", "pattern": f"a{{{i}}}"} for i in range(1000)]}),
        "more than 0.4 s",
    ),
    "many optional": (
        Schema({"properties": {f"p{i}": {"type": "string"} for i in range(8000)}}),
        "too many optional parts",
    ),
    "long chain": (Schema(references(3000, lambda to: {"items": to})), "nested too deeply"),
    "long merge": (Schema(references(3000, lambda to: {"allOf": [to]})), "nested too deeply"),
    "deep": (Schema(nested(10_000)), "nested too deeply"),
    "less deep": (Schema(nested(200)), "recursion limit"),
    "many values": (Schema({"enum": [f"v{i}" for i in range(10**5)]}), "characters as JSON"),
    "multiplied": (
        Schema({"allOf": [{"anyOf": [{"minLength": i} for i in range(9)]}] * 9}),
        "too large",
    ),
    "circle": (Schema({"$ref": "#"}), "no text fits"),
    "elsewhere": (Schema({"$ref": "http://localhost:1/a.json"}), "not present"),
    "file": (Schema({"$ref": "file:///etc/passwd"}), "not present"),
    "unsupported": (Schema({"not": {"type": "string"}}), r'Unimplemented keys: \["not"\]'),
    "no schema": (Schema([1]), "cannot be read"),  # pyright: ignore[reportArgumentType]
    "not JSON": (Schema({"const": float("nan")}), "not JSON compliant"),
    "surrogate": (Regex("a\udc80"), "cannot be read"),
    "parentheses": (Regex("(" * 10_000 + "a" + ")" * 10_000), "exceed.* nest"),
    "look-around": (Regex("(?=a)b"), "look-around"),
    "no expression": (Regex("(("), "unclosed group"),
    "long": (Regex("ab" * 200_000), "characters as JSON"),
    "brackets": (Lark("start: " + "(" * 9999 + '"a"' + ")" * 9999), "too deeply nested"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_too_much_is_refused_soon(plain: Grammars, name: str) -> None:
    spec, message = HOSTILE[name]
    plain.compile(Regex("ab?"))  # the process for trials has started
    started = time.monotonic()
    with pytest.raises(GrammarError, match=message) as raised:
        plain.compile(spec)
    assert time.monotonic() - started < 3
    assert len(str(raised.value)) < 600
    assert plain.compile(Schema({"type": "object"}))  # the next one is served


LASTING: dict[str, Spec] = {
    "nested repetition": Regex("(a+)+b"),
    "many": Regex("a{1,100000}"),
    "very many": Regex("((a{1,1000}){1,1000}){1,1000}"),
    "many states": Regex("(a|b)*a.{2000}"),
    "many of many states": Regex("(.{0,500}a.{0,500}b)*.{0,500}c"),
    "many items": Schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    "long": Schema({"type": "string", "maxLength": 10**9}),
    "many values": Schema({"enum": [f"value {i}" for i in range(5000)]}),
    "many keys": Schema({"properties": {f"p{i}": {"type": "string"} for i in range(600)}}),
}


@pytest.mark.parametrize("name", LASTING)
def test_no_step_takes_long(plain: Grammars, name: str) -> None:
    matcher, chance, longest = plain.compile(LASTING[name]), random.Random(0), 0.0
    try:
        for _ in range(300):
            started = time.monotonic()
            may = [i for i in allowed(matcher) if chr(i) in 'ab]1, "value']
            matcher.accept(chance.choice(may) if may else allowed(matcher)[0])
            longest = max(longest, time.monotonic() - started)
    except GrammarError as error:
        assert "too many" in str(error)
    assert longest < 1


def test_a_sequence_that_uses_up_the_lexer_ends_alone(
    monkeypatch: pytest.MonkeyPatch, plain: Grammars
) -> None:
    monkeypatch.setitem(grammar.LIMITS, "max_lexer_states", 400)
    spec = Regex("(a|b)*a(a|b){200}")
    patient, greedy = plain.compile(spec), plain.compile(spec)
    for token in b"abab" * 5:
        patient.accept(token)
    chance = random.Random(0)
    with pytest.raises(GrammarError, match="too many states"):
        for _ in range(1000):
            greedy.accept(chance.choice(b"ab"))
            allowed(greedy)
    assert allowed(patient) == allowed(patient.copy()) == [ord("a"), ord("b")]
    assert allowed(plain.compile(spec)) == [ord("a"), ord("b")]


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch, plain: Grammars) -> None:
    for i in range(2 * grammar.CACHE_ENTRIES):
        plain.compile(Schema({"const": i}))
    assert len(plain._compiled) == grammar.CACHE_ENTRIES
    monkeypatch.setattr(grammar, "CACHE_BYTES", 200)
    plain.compile(Regex("a"))
    assert len(plain._compiled) <= 2


def test_trials_go_on_after_their_process_is_killed(tokenizers: dict[str, Tokenizer]) -> None:
    grammars = Grammars(tokenizers["byte"], 300)
    grammars._trials.stop()
    with pytest.raises(Busy, match="try again"):
        grammars.compile(Regex("a"))
    assert allowed(grammars.compile(Regex("a"))) == [ord("a")]


def test_who_waits_too_long_for_the_trials_of_others_is_told(
    monkeypatch: pytest.MonkeyPatch, plain: Grammars
) -> None:
    monkeypatch.setattr(grammar, "WAIT_S", 0.01)
    with plain._trials._lock, pytest.raises(Busy, match="try again"):
        plain.compile(Regex("busy"))
    assert allowed(plain.compile(Regex("busy"))) == [ord("b")]
