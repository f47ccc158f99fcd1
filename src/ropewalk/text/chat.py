"""Chat templates: messages to the text, and the ids, that a model was tuned on.

Templates come with models, that is from strangers, and messages from the network: `sandbox` limits
what they can do. They have the functions that Hugging Face templates expect and nothing else.
"""

import datetime
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from ropewalk.core.errors import DataError
from ropewalk.text import sandbox
from ropewalk.text.interface import Tokenizer, checked

Message = dict[str, Any]

TEMPLATE_CHARS = 64 * 1024


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
    template, which changes none of them. Raises DataError when there is no template, when it is
    broken, when it refuses the messages, or when it goes beyond the limits of `sandbox`.
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
        return sandbox.render(compiled, variables)
    except DataError as error:
        raise DataError(
            f"the chat template of {tokenizer.name} refuses these messages: {error!s:.1000}"
        ) from None
    except Exception as error:  # a template can call forth nearly any
        raise DataError(
            f"the chat template of {tokenizer.name} fails: {type(error).__name__}: {error!s:.1000}"
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
    if len(template) > TEMPLATE_CHARS:
        raise DataError(
            f"the chat template of {name} has {len(template)} characters, limit {TEMPLATE_CHARS}"
        )
    environment = sandbox.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _refuse,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(functions)
    try:
        return environment.from_string(template)
    except Exception as error:  # Python's of the program that Jinja writes are among them
        line = getattr(error, "lineno", None)
        raise DataError(
            f"the chat template of {name}, line {line}, is not valid Jinja: {error}"
        ) from None


def _refuse(message: str) -> None:
    raise DataError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 200:
        raise DataError(f"strftime_now of {len(form)} characters, limit 200")
    return datetime.datetime.now().astimezone().strftime(form)
