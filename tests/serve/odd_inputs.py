"""Requests that look as if they were to be refused, and are not: fields that nobody knows are told
in a header, expressions that take others hours take no time here."""

import json
from collections.abc import Iterator

from tests.serve.bad_inputs import (
    CHAT,
    COMPLETIONS,
    NAN,
    OTHERS,
    WHOLE,
    Case,
    chat,
    completion,
    nested,
    written,
)


def tolerated() -> Iterator[Case]:
    """Requests that are served."""
    for path, whole in WHOLE.items():
        needed = {"model", "prompt", "messages", "input", "tokens", "add_generation_prompt"}
        few = {name: value for name, value in whole.items() if name in needed}
        short = {name: 1 for name in whole if name in ("max_tokens", "max_output_tokens")}
        for body in (whole, *OTHERS.get(path, ()), {**dict.fromkeys(whole), **few, **short}):
            yield Case(path, body, None, (200,))
    for make in (completion, chat):
        for more in (
            {"prompt_logprobs": -1}, {"allowed_token_ids": [2**64]}, {"bad_words": [""]},
            {"min_tokens": 10**9}, {"guided_json": "{"}, {"chat_template": "{{ ''.__class__ }}"},
            {"x": NAN}, {f"x{i}": [] for i in range(10**5)}, {"a\r\nset-cookie: b": 1}, {'"': 1},
            {"\\": 1}, {"é\u202e": 1}, {"extra_body": {"a": 1}}, {"temperature": 0},
            {"seed": -(2**63)}, {"top_k": -1}, {"stop": []}, {"logit_bias": {"0": -100}},
        ):  # fmt: skip
            case = make(None, **more)
            yield Case(case.path, case.body, None, (200,))
        deep = written(make(None, x="@"), nested("a", 900))
        yield Case(deep.path, deep.body, None, (200,))
    for regex in (
        "(a+)+b",
        "(a|a)*b",
        "(x+x+)+y",
        "a{1,100000}",
        "(((a{1,100}){1,100}){1,100}){1,9}",
        "(a?){4000}a{4000}",
        "(?:a|b|ab){50}c",
        "." * 8000,
    ):
        form = {"type": "regex", "regex": regex}
        yield Case(CHAT, {**chat(None).body, "response_format": form}, None, (200,))
    for schema in (
        {"type": "array", "minItems": 10**9}, {"type": "string", "minLength": 10**9},
        {"type": "string", "pattern": "^(a+)+b$"}, {"type": "string", "pattern": "a{1,100000}"},
        {"properties": {"next": {"$ref": "#"}}}, {"enum": [f"v{i}" for i in range(10**4)]},
        {"x-guidance": {"whitespace_pattern": "("}},
    ):  # fmt: skip
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        yield Case(CHAT, {**chat(None).body, "response_format": form}, None, (200,))
    for prompt in ("", "\x00", "\u202e", "<|eos|>", "a" * 200, [65], [[65], [66]], ["a", ""]):
        yield Case(COMPLETIONS, completion(None, prompt=prompt).body, None, (200,))
    plain = json.dumps(completion(None).body)
    for raw in (
        plain.encode("utf-16"),
        b"\xef\xbb\xbf" + plain.encode(),
        plain.encode() + b" " * 10**6,
    ):
        yield Case(COMPLETIONS, raw, None, (200,))
