"""Which tools an answer may or must call, and the grammar that holds a model to it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.core.errors import UserError
from ropewalk.serve import reasoning
from ropewalk.serve.tools import Format

NAME = re.compile(r"[\w.:/-]+", re.ASCII)  # what JSON writes as it is

# JSON as templates write it, so that no model can dwell on blanks; what a schema asks beyond what
# a grammar can hold is left to the model.
JSON_STYLE = {
    "whitespace_flexible": False, "key_separator": ": ", "item_separator": ", ", "lenient": True,
}  # fmt: skip


class ToolError(UserError):
    """Tools or a `tool_choice` of a request that cannot be served."""


@dataclass(frozen=True)
class Choice:
    """Which functions an answer may call, each with the JSON schema of its arguments.

    `forced`: it must call one. `parallel`: it may call more than one.
    """

    functions: Mapping[str, Mapping[str, Any]]
    forced: bool = False
    parallel: bool = True


def choose(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel: bool = True,
) -> Choice:
    """What `tools`, `tool_choice` and `parallel_tool_calls` of a request ask for.

    Raises ToolError where a tool is not a function with a name of its own and the schema of an
    object, or where there is no such tool to choose.
    """
    functions: dict[str, Mapping[str, Any]] = {}
    for tool in tools or ():
        name, schema = _function(tool)
        if name in functions:
            raise ToolError(f"two tools have the name {name!r}; each needs its own")
        functions[name] = schema
    match tool_choice:
        case "none":
            return Choice({})
        case "auto" | None:
            return Choice(functions, False, parallel)
        case "required" if functions:
            return Choice(functions, True, parallel)
        case {"type": "function", "function": {"name": str(name)}} if name in functions:
            return Choice({name: functions[name]}, True, False)
    raise ToolError(
        f'tool_choice {tool_choice!r:.80} is not "none", "auto", "required" where there are tools,'
        ' or {"type": "function", "function": {"name": ...}} with the name of one; there are'
        f" {len(functions)} tools: {', '.join(functions)}"
    )


def _function(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    match tool:
        case {"type": "function", "function": {"name": str(name), **rest}} if NAME.fullmatch(name):
            schema = rest.get("parameters")
        case _:
            raise ToolError(
                'a tool must be {"type": "function", "function": {"name": ..., "parameters":'
                f" ...}}}}, its name of letters, digits, _ . : / and -; not {tool!r:.80}"
            )
    if schema is None:  # OpenAI: no parameters
        schema = {"properties": {}, "additionalProperties": False}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise ToolError(f"parameters of {name!r} must be a JSON schema of type object")
    return name, {"type": "object", **schema}


def grammar(
    form: Format,
    choice: Choice,
    thinking: reasoning.Thinking | None,
    tokens: Mapping[str, int],
) -> str:
    """A Lark grammar for llguidance: calls of the functions that `choice` allows, and nothing else
    but what may be thought before them.

    `tokens`: the ids of the markers that are special tokens, which no text can stand for.
    llguidance warns of what it ignores in a schema (`LLMatcher.get_grammar_warnings`).
    """

    def spelt(*text: str) -> str:
        return " ".join(reasoning.spelling(part, tokens) for part in text)

    begin, between, end = (spelt(*text) for text in form.texts)
    more = f"({between} call)*" if choice.parallel and form.several else ""
    rules = [
        f"start: {'thinking' if thinking else ''} {begin} call {more} {end}",
        f"call: {' | '.join(f'call_{i}' for i in range(len(choice.functions)))}",
    ]
    for i, (name, schema) in enumerate(choice.functions.items()):
        before, after = (spelt(*text) for text in form.call(name))
        styled = json.dumps({**schema, "x-guidance": JSON_STYLE})
        rules.append(f"call_{i}: {before} %json {styled} {after}")
    if thinking:
        rules.append(thinking.rule(tokens))
    return "\n".join(rules)
