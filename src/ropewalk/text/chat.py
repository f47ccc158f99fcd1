"""Chat templates: messages to the text, and the ids, that a model was tuned on.

Templates come with models, that is from strangers: they run in Jinja's immutable sandbox, with the
functions that Hugging Face templates expect and nothing else.
"""

import datetime
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from ropewalk.core.errors import DataError
from ropewalk.text.interface import Tokenizer, checked

Message = dict[str, Any]


class _Generation(jinja2.ext.Extension):
    """Lets `{% generation %}` blocks, which mark what the assistant says, through unchanged."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The body of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    **extra: Any,
) -> str:
    """The conversation as text, by the tokenizer's chat template.

    A message is `{"role": ..., "content": ...}`. `extra` (for example `tools`) is handed to the
    template. Raises DataError when there is no template, when it is broken, or when it refuses the
    messages.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"tokenizer {tokenizer.name} has no chat template; use a model tuned for conversation,"
            " or generate from plain text"
        )
    compiled = _compile(tokenizer.chat_template, tokenizer.name)
    variables = {
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
        "bos_token": "" if tokenizer.bos_id is None else tokenizer.spelling(tokenizer.bos_id),
        "eos_token": tokenizer.spelling(tokenizer.eos_ids[0]) if tokenizer.eos_ids else "",
        "pad_token": "" if tokenizer.pad_id is None else tokenizer.spelling(tokenizer.pad_id),
        **extra,
    }
    try:
        return compiled.render(variables)
    except DataError as error:
        raise DataError(
            f"the chat template of {tokenizer.name} refuses these messages: {error}"
        ) from None
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise DataError(
            f"the chat template of {tokenizer.name} fails: {type(error).__name__}: {error}"
        ) from None


def encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    **extra: Any,
) -> list[int]:
    """The conversation as ids; BOS is there exactly when the template writes it. Errors as
    `render`."""
    text = render(tokenizer, messages, add_generation_prompt, **extra)
    return tokenizer.encode(checked(text), allow_special=True)


@functools.lru_cache(maxsize=16)
def _compile(template: str, name: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _refuse,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(functions)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise DataError(
            f"the chat template of {name}, line {line}, is not valid Jinja: {error}"
        ) from None


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """As Hugging Face's: plain JSON, without Jinja's escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise DataError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)
