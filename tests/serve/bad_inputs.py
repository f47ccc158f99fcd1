"""A table of requests that no server may fall over, and what each of them must be told."""

import base64
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
EMBEDDINGS, TOKENIZE, DETOKENIZE = "/v1/embeddings", "/tokenize", "/detokenize"
VOCABULARY, MOST_BYTES = 264, 4 * 2**20
HALF = "\ud800"  # half of a character, which JSON can write and UTF-8 cannot
NAN, INFINITY = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """A request. `body`: what JSON can write, or bytes as they are; an iterator goes in chunks.

    The answer's status is one of `status`; its error is about the field `param` or one in it.
    """

    path: str
    body: Any = None
    param: str | None = None
    status: tuple[int, ...] = (400,)
    method: str = "POST"
    headers: Sequence[tuple[str, str]] = (("content-type", "application/json"),)

    @property
    def sent(self) -> bytes | Iterable[bytes] | None:
        """The body as it goes."""
        plain = self.body is None or isinstance(self.body, bytes | Chunks)
        return self.body if plain else json.dumps(self.body).encode()

    @property
    def about(self) -> str:
        """For the one who reads what went wrong."""
        headers = "" if self.headers == Case.headers else f" {self.headers!r:.80}"
        return f"{self.method} {self.path:.80}{headers} {self.body!a:.300}"


@dataclass(frozen=True)
class Chunks:
    """A body without a length that is told before."""

    size: int

    def __iter__(self) -> Iterator[bytes]:
        return itertools.repeat(b" " * 2**16, self.size // 2**16)


SAY = [{"role": "user", "content": "a"}]
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": False}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SAMPLED = {
    "model": "tiny", "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.1,
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.5, "seed": 1,
    "stop": ["never"], "stop_token_ids": [1], "ignore_eos": False, "logit_bias": {"65": 0.5},
    "n": 1, "stream": False, "stream_options": {"include_usage": True}, "priority": 0,
    "cache_salt": "s", "user": "u",
}  # fmt: skip
FORMAT = {
    "type": "json_schema", "regex": "a",
    "json_schema": {"name": "x", "description": "d", "schema": {"type": "object"}, "strict": True},
}  # fmt: skip
TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "me"},
    {"role": "assistant", "content": "b", "tool_calls": [CALL], "reasoning_content": "c"},
    {"role": "tool", "tool_call_id": "c", "content": "d"},
]
CONVERSATION = {
    **SAMPLED, "messages": TALK, "max_tokens": 1, "max_completion_tokens": 1, "logprobs": True,
    "top_logprobs": 1, "tools": [TOOL], "tool_choice": "none", "parallel_tool_calls": True,
    "response_format": FORMAT, "reasoning_effort": "low", "chat_template_kwargs": {"x": 1},
}  # fmt: skip
NAMED = {"type": "function", "function": {"name": "f"}}
ITEMS = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "d"},
]
RESPONSE = {
    **SAMPLED, "input": ITEMS, "instructions": "i", "max_output_tokens": 1,
    "tools": [{"type": "function", **FUNCTION}], "tool_choice": "none",
    "parallel_tool_calls": True, "text": {"format": {**FORMAT["json_schema"], "type": "text"}},
    "include": ["message.output_text.logprobs"], "top_logprobs": 1, "metadata": {"a": "b"},
    "truncation": "disabled", "reasoning": {"effort": "low"}, "chat_template_kwargs": {"x": 1},
}  # fmt: skip
# Every field of every route, as it may be.
WHOLE: dict[str, dict[str, Any]] = {
    COMPLETIONS: {**SAMPLED, "prompt": "a", "max_tokens": 1, "logprobs": 1, "echo": False,
                  "best_of": 1, "suffix": "", "response_format": FORMAT},
    CHAT: CONVERSATION,
    RESPONSES: RESPONSE,
    EMBEDDINGS: {"model": "tiny", "input": "a", "encoding_format": "float", "dimensions": 2,
                 "pooling": "mean", "priority": 0, "user": "u"},
    TOKENIZE: {"model": "tiny", "messages": SAY, "add_generation_prompt": True},
    DETOKENIZE: {"model": "tiny", "tokens": [65]},
}  # fmt: skip
OTHERS = {
    CHAT: [{**CONVERSATION, "tool_choice": NAMED}],
    RESPONSES: [{**RESPONSE, "tool_choice": {"type": "function", "name": "f"}}],
    TOKENIZE: [{"prompt": "a"}],
}
WRONG: dict[type, tuple[Any, ...]] = {
    int: ("1", 1.5, True, [], {}, NAN), float: ("1", True, [], NAN, INFINITY),
    bool: (1, "true", [], {}), str: (1, True, {}, [], HALF), list: (1, "x", {}),
    dict: (1, "x", []),
}  # fmt: skip
# What is right although it is of another type, by the end of its path.
RIGHT = {
    "stop": (list, str), "content": (list, str), "output": (list, str), "input": (list, str),
}  # fmt: skip
OPAQUE = ("parameters", "schema", "chat_template_kwargs")
CHOICES = ("type", "role", "encoding_format", "pooling", "truncation")


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Everything in a body, each with the way to it."""
    if path:
        yield path, value
    if not path or path[-1] not in OPAQUE:
        inside = value.items() if isinstance(value, dict) else ()
        for key, inner in enumerate(value) if isinstance(value, list) else inside:
            yield from nodes(inner, (*path, key))


def replaced(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The body with another value at the end of the path."""
    if not path:
        return value
    new = body.copy()
    new[path[0]] = replaced(body[path[0]], path[1:], value)
    return new


def wrong_types() -> Iterator[Case]:
    """Every field of every route as each of the types that it is not."""
    for path, whole in WHOLE.items():
        known: set[tuple[Any, ...]] = set()
        for body in [whole, *OTHERS.get(path, ())]:
            for way, value in nodes(body):
                right = RIGHT.get(str(way[-1]), ())
                values = [one for one in WRONG[type(value)] if not isinstance(one, right)]
                values += ["other"] * (way[-1] in CHOICES)
                values += [HALF] * (str in right)
                kind = (*way, type(value))
                for one in values if kind not in known else ():
                    yield Case(path, replaced(body, way, one), ".".join(map(str, way)))
                known.add(kind)


def nested(inner: str, depth: int) -> Any:
    """So many objects in one another; written by hand, as Python's own writer gives up."""
    return f'{{"{inner}":' * depth + "{}" + "}" * depth


def completion(param: str | None, **more: Any) -> Case:
    """A completion with something wrong."""
    return Case(COMPLETIONS, {"model": "tiny", "prompt": "a", "max_tokens": 1, **more}, param)


def chat(param: str | None, **more: Any) -> Case:
    """A chat completion with something wrong."""
    return Case(CHAT, {"model": "tiny", "messages": SAY, "max_tokens": 1, **more}, param)


def written(case: Case, number: str) -> Case:
    """The case with a number that Python would write in another way in place of "@"."""
    body = json.dumps(case.body).replace('"@"', number).encode()
    return Case(case.path, body, case.param)


BEYOND: dict[str, tuple[Any, ...]] = {
    "temperature": (-0.1, 2.1, 1e308), "top_p": (-0.1, 1.1), "top_k": (-2, 2**31, 2**70),
    "min_p": (-0.1, 1.1), "presence_penalty": (-2.1, 2.1), "frequency_penalty": (-2.1, 2.1),
    "repetition_penalty": (0, -1, 10.1), "seed": (2**63, -(2**63) - 1, 2**70),
    "n": (0, -1, 17, 10**6, 2**63, 10**4000), "priority": (-101, 101, 2**70),
    "max_tokens": (-1, 10**12, 2**31, 2**64, 10**4000, 1e12), "cache_salt": ("", "s" * 257),
    "stop": ("", [""], ["a"] * 17, "a" * 257, ["a" * 257], [None], [[]]),
    "user": ("u" * 257, "u" * 10**6), "model": (None, "m" * 257, "m" * 10**6),
}  # fmt: skip
NUMBERS = ("1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1e400")


def bounds() -> Iterator[Case]:
    """Numbers and texts that are too small, too large, or none."""
    for (param, values), make in itertools.product(BEYOND.items(), (completion, chat)):
        yield from (make(param, **{param: value}) for value in values)
    for param in ("temperature", "top_p", "min_p", "presence_penalty", "n", "max_tokens", "seed"):
        yield from (written(completion(param, **{param: "@"}), number) for number in NUMBERS)
    yield chat("max_tokens", max_tokens=0)
    yield from (chat("max_completion_tokens", max_completion_tokens=n) for n in (0, -1, 2**31))
    yield from (completion("best_of", best_of=n) for n in (0, -1, 2, 10**6, 2**63))
    yield completion("best_of", best_of=1, n=2)
    yield completion("suffix", suffix="z")
    for count in (-1, 21, 10**9, 2**63):
        yield completion("logprobs", logprobs=count)
        yield chat("top_logprobs", logprobs=True, top_logprobs=count)
    yield chat("top_logprobs", top_logprobs=5)
    yield chat("top_logprobs", top_logprobs=5, logprobs=False)
    for count in (0, -1, 33, 2**31, 10**4000):
        yield Case(EMBEDDINGS, {"model": "tiny", "input": "a", "dimensions": count}, "dimensions")
    for path in (EMBEDDINGS, COMPLETIONS, CHAT, RESPONSES):
        yield Case(path, {name: v for name, v in WHOLE[path].items() if name != "model"}, "model")


def ids() -> Iterator[Case]:
    """Tokens that the model lacks: the device would take each for another one."""
    for token in (-1, VOCABULARY, VOCABULARY + 1, 2**31 - 1, 2**31, 2**64, 1.5, "1", None, True):
        if not isinstance(token, str):
            yield completion("prompt", prompt=[token])
        yield completion("prompt", prompt=[65, token])
        yield completion("prompt", prompt=[[65], [token]])
        yield completion("stop_token_ids", stop_token_ids=[token])
        yield chat("stop_token_ids", stop_token_ids=[65, token])
        yield Case(EMBEDDINGS, {"model": "tiny", "input": [65, token]}, "input")
    for token in ("-1", VOCABULARY, 2**31, 2**64, "a", "", "1.5", " 1", "0x1", "\u0661", HALF):
        yield completion("logit_bias", logit_bias={str(token): 1})
        yield chat("logit_bias", logit_bias={"65": 1, str(token): 1})
    for bias in (-100.1, 101, NAN, "1", None, [], True):
        yield completion("logit_bias", logit_bias={"65": bias})
    yield completion("logit_bias", logit_bias={str(token): 1 for token in range(301)})
    yield completion("stop_token_ids", stop_token_ids=[65] * 17)
    yield completion("stop_token_ids", stop_token_ids=[*range(16)])
    for token in (-1, 2**31, 2**64, 1.5, "1", None):
        yield Case(DETOKENIZE, {"tokens": [65, token]}, "tokens")


def prompts() -> Iterator[Case]:
    """Prompts of no kind, of two kinds, and of none or too many tokens."""
    for prompt in (
        None, 5, True, {}, [], [[]], [[], [65]], ["a", 5], ["a", [65]], [65, "a"], [[65], "a"],
        [["a"]], [[[65]]], [None], HALF, [HALF], [[65, HALF]], [65] * 10**4, "a" * 10**5,
        ["a", "a" * 10**5], ["a"] * 2049, [[65]] * 2049,
    ):  # fmt: skip
        yield completion("prompt", prompt=prompt)
        yield Case(EMBEDDINGS, {"model": "tiny", "input": prompt}, "input")
    yield completion("prompt", prompt=["a"] * 65)
    yield completion("prompt", prompt=["a"] * 64, n=16)
    yield Case(COMPLETIONS, {"model": "tiny"}, "prompt")
    yield Case(EMBEDDINGS, {"model": "tiny"}, "input")
    yield Case(DETOKENIZE, {}, "tokens")
    yield Case(TOKENIZE, {}, "prompt")
    yield Case(TOKENIZE, {"prompt": "a", "messages": SAY}, "prompt")
    yield Case(TOKENIZE, {"messages": []}, "messages")


def millions() -> Iterator[Case]:
    """As much as a body can hold, each wrong in its own way: a list of the mistakes would take
    seconds."""
    many = 10**6
    for prompt in (["a"] * (many * 4 // 5), [-1] * many, [[]] * many, [65] * many, "a" * 4 * many):
        yield completion("prompt", prompt=prompt)
        yield Case(EMBEDDINGS, {"model": "tiny", "input": prompt}, "input")
    yield completion("stop", stop=[1] * many)
    yield completion("stop_token_ids", stop_token_ids=["a"] * (many // 2))
    yield completion("logit_bias", logit_bias={f"x{i}": "" for i in range(many // 5)})
    yield Case(DETOKENIZE, {"tokens": [""] * many}, "tokens")
    yield Case(TOKENIZE, {"messages": [1] * many}, "messages")
    yield Case(TOKENIZE, {"prompt": "a" * 4 * many}, "prompt")
    yield Case(TOKENIZE, {"messages": [{"role": "user", "content": "a" * 4 * many}]}, "messages")
    yield chat("messages", messages=[{}] * many)
    yield chat("messages", messages=SAY * 2049)
    yield chat("messages", messages=[{"role": "user", "content": "a" * 4 * many}])
    yield chat("messages", messages=[{"role": "user", "content": [1] * 256}] * 2048)
    yield chat("messages", messages=[{"role": "assistant", "tool_calls": [1] * 128}] * 2048)
    yield chat("tools", tools=[1] * many)
    kwargs = {f"x{i}": [] for i in range(many // 5)}
    yield chat("chat_template_kwargs", chat_template_kwargs=kwargs)
    response = {"model": "tiny", "max_output_tokens": 1}
    yield Case(RESPONSES, {**response, "input": [1] * many}, "input")
    yield Case(RESPONSES, {**response, "input": [{"content": [1] * 256}] * 2048}, "input")
    yield Case(RESPONSES, {**response, "input": "a", "metadata": kwargs}, "metadata")
    yield Case(RESPONSES, {**response, "input": "a", "include": [1] * many}, "include")


MODELS = (
    "other", "TINY", "tiny ", " tiny", "tiny/", "./tiny", "../tiny", "../../../etc/passwd",
    "/etc/passwd", "%2e%2e%2f", "..\\..\\windows", "tiny\x00", "tiny\n", "file:///etc/passwd",
    "s3://bucket/tiny", "http://169.254.169.254/", "$(id)", "tiny;id", "\u202etiny", "é" * 128,
)  # fmt: skip


def models() -> Iterator[Case]:
    """Names of models that are none, or that would be paths."""
    for name in MODELS:
        for path in (COMPLETIONS, CHAT, EMBEDDINGS, RESPONSES, TOKENIZE, DETOKENIZE):
            yield Case(path, {**WHOLE[path], "model": name}, "model", (404,))
    for path in (
        "..%2f..%2fetc%2fpasswd",
        "../../etc/passwd",
        "%00",
        "%ff%fe",
        "",
        "a" * 60_000,
        "tiny/..",
        "%2e%2e",
        "/etc/passwd",
    ):
        yield Case(f"/v1/models/{path}", None, "model", (404,), "GET")


def texts() -> Iterator[Case]:
    """Bodies that are no JSON, or none that is taken."""
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}).encode()
    for raw in (
        b"", b" ", b"null", b"[]", b'"a"', b"1", b"true", b"{", b"}", b'{"model":', b"{'model': 1}",
        b'{"model" "tiny"}', body + b"x", body + body, b"\xef\xbb\xbf\xff", b'{"model": "\xff"}',
        b'{"model": "\xed\xa0\x80"}', b"\x00" * 100, b'{"model": "a\x00"}', b'{"a": .5}',
        b'{"a": 01}', b'{"a": +1}', b'{"a": 1e}', b"{,}", b'{"a": 1,}', b"// a\n{}",
        b'{"n": 1' + b"0" * 5000 + b"}", b"[" * 10**5, b'{"a":' * 10**5, b"[" * 3000 + b"]" * 3000,
        b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "{}".encode("utf-16-le")[:3], b'{"\\ud800": 1',
        body.replace(b"1}", b'1, "n": 0, "n": [}'), b"a=b&c=d", b"\x1f\x8b\x08",
        b"--x\r\n\r\n{}\r\n--x--",
    ):  # fmt: skip
        for path in (COMPLETIONS, CHAT, TOKENIZE):
            yield Case(path, raw)
    yield Case(COMPLETIONS, body.replace(b"1}", b'1, "n": 1, "n": 0}'), "n")  # the last one holds
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/octet-stream",
        "application",
        "",
        "application/jsonx",
        "é",
    ):
        yield Case(COMPLETIONS, body, headers=[("content-type", kind)])
    yield Case(COMPLETIONS, body, headers=[])
    gzip = [*Case.headers, ("content-encoding", "gzip")]
    yield Case(COMPLETIONS, b"\x1f\x8b\x08" + b"\x00" * 100, headers=gzip)
    for path in (COMPLETIONS, CHAT, EMBEDDINGS, TOKENIZE, DETOKENIZE, RESPONSES):
        yield Case(path, b" " * (MOST_BYTES + 1), status=(413,))
        yield Case(path, Chunks(MOST_BYTES + 2**16), status=(413,))
        yield Case(path, None)
        yield Case(path + "/", body, status=(404,))
    for path in (
        "/",
        "/v1",
        "/v1/",
        "/v1/completion",
        "/v2/completions",
        "/.env",
        "/docs",
        "/redoc",
        "/v1/files",
        "/v1/chat",
        "/%00",
        "/..%2f..%2fetc%2fpasswd",
        "/health/../v1/models",
        "//health",
        "/v1//completions",
        "/V1/COMPLETIONS",
        "/a" * 1000,
        "/metrics/x",
    ):
        yield Case(path, body, status=(404, 405))


def methods(routes: Mapping[str, set[str]]) -> Iterator[Case]:
    """Ways to ask that a route does not have."""
    known = ("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "PATCH", "POST", "PROPFIND")
    for path, has in routes.items():
        for method in known:
            if method not in has:
                yield Case(path, None, None, (405,), method)


def keyless(routes: Iterable[str], key: str) -> Iterator[Case]:
    """Every route without the key, or with what is not quite it."""
    near = (
        "", key, "Bearer", "Bearer ", f"Basic {key}", f"Token {key}", f"Bearer: {key}",
        f"Bearer{key}", f"Bearer {key[:-1]}", f"Bearer {key[1:]}", f"Bearer {key}x",
        f"Bearer {key.swapcase()}", f"Bearer {'k' * len(key)}", f"Bearer {key} {key}",
        f"Bearer {key},", f'Bearer "{key}"', f"Bearer {'k' * 10**6}",
    )  # fmt: skip
    basic = (key, f"{key}:", f"user:{key}x", f"user:{key}:", "user:", ":", "")
    near += tuple(f"Basic {base64.b64encode(one.encode()).decode()}" for one in basic)
    near += ("Basic ====", "Basic \u00e9", f"Basic user:{key}")
    tries = [[], *([("authorization", one)] for one in near)]
    tries += [[(name, key)] for name in ("x-api-key", "api-key", "authorization-key")]
    tries += [[("authorization", f"Bearer {key}")] * 2]
    tries += [[("authorization", f"Bearer {one}") for one in (key, "wrong")]]
    for path, headers in itertools.product(routes, tries):
        long = any(len(value) > 2**16 for _, value in headers)
        yield Case(path, None, None, (401, 431) if long else (401,), "GET", headers)
    for path in ("/v1/models?api_key=", "/v1/models?key=", "/health/../v1/models?", "//health?"):
        yield Case(path + key, None, None, (401,), "GET", ())
