"""What an answer is made of, as the deltas of a chat completion."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A piece of what was thought before the answer."""

    text: str


@dataclass(frozen=True)
class Call:
    """The begin of a tool call."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """A piece of the JSON that is the arguments of a call, as the model wrote it."""

    index: int
    text: str


Delta = Content | Reasoning | Call | Arguments


def openai(delta: Delta) -> dict[str, Any]:
    """The `delta` of a chat completion's chunk."""
    match delta:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case Call(index, id, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same deltas with neighbouring pieces of one text in one."""
    whole: list[Delta] = []
    for _, group in groupby(deltas, lambda d: (type(d), getattr(d, "index", None))):
        first, *more = group
        if not isinstance(first, Call):
            text = "".join([first.text, *(d.text for d in more if not isinstance(d, Call))])
            first = replace(first, text=text)
        whole.append(first)
    return whole


def message(deltas: Iterable[Delta]) -> dict[str, Any]:
    """The whole answer as the `message` of a chat completion."""
    texts: dict[type, str] = {Content: "", Reasoning: ""}
    calls: list[dict[str, Any]] = []
    for delta in merged(deltas):
        match delta:
            case Call(_, id, name):
                function = {"name": name, "arguments": ""}
                calls.append({"id": id, "type": "function", "function": function})
            case Arguments(index, text):
                calls[index]["function"]["arguments"] += text
            case _:
                texts[type(delta)] += delta.text
    content = texts[Content] or (None if calls else "")
    answer: dict[str, Any] = {"role": "assistant", "content": content}
    if texts[Reasoning]:
        answer["reasoning_content"] = texts[Reasoning]
    if calls:
        answer["tool_calls"] = calls
    return answer
