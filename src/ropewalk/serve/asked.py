"""What may be asked: the fields of every request, their types and bounds. Nothing reaches the
engine that has not passed here, as a device takes an id out of range for another."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field

from ropewalk.core.errors import UserError
from ropewalk.serve.slots import MOST_BIASES, MOST_RANKED, MOST_STOPS, Settings

MOST_CHOICES = 16
MOST_PROMPTS = 64
MOST_INPUTS = 2048
MOST_MESSAGES = 2048
MOST_TOOLS = 128
MOST_KWARGS = 16
_STOP_LENGTH = 256
_WORD = Field(max_length=256)

Id = Annotated[int, Field(ge=0, lt=2**31)]
Word = Annotated[str, _WORD]
Text = Annotated[str, Field(max_length=4 * 2**20)]
Stop = Annotated[str, Field(min_length=1, max_length=_STOP_LENGTH)]


class BadRequest(UserError):
    """A request that cannot be served as it is; `param` names the field."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code


def few(most: int) -> BeforeValidator:
    """At most so many entries of an object, counted before each is looked at: a message for every
    wrong one of a million takes seconds. Lists have `fail_fast`."""

    def counted(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"has {len(value)} entries, limit {most}")
        return value

    return BeforeValidator(counted)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("has half a character in a text") from None
    except ValueError:
        raise ValueError("has a number that is not finite") from None
    return value


Plain = Annotated[dict[str, Any], AfterValidator(_plain)]
"""what JSON can write"""


class Asked(pydantic.BaseModel):
    """A request's body. Fields that are not known are tolerated and told in a header."""

    model_config = pydantic.ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @property
    def unknown(self) -> list[str]:
        """Names of fields that change nothing, here and in what fields hold."""
        found = {name for name, value in (self.model_extra or {}).items() if value is not None}
        for name in type(self).model_fields:
            value = getattr(self, name)
            for one in value if isinstance(value, list) else (value,):
                if isinstance(one, Asked):
                    found.update(f"{name}.{inner}" for inner in one.unknown)
        return sorted(found, key=lambda name: (name.count("."), name))


class StreamOptions(Asked):
    """How a stream is told."""

    include_usage: bool | None = None


class JsonSchema(Asked):
    """A schema that an answer follows."""

    name: Word | None = None
    description: Text | None = None
    schema_: Plain = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Asked):
    """What an answer looks like."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: Annotated[str, Field(min_length=1, max_length=8192)] | None = None

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "ResponseFormat":
        for kind in ("json_schema", "regex"):
            if self.type == kind and getattr(self, kind) is None:
                raise BadRequest(f"{kind}: is missing", kind)
        held = self.json_schema if self.type == "json_schema" else None
        if held and "schema_" not in held.model_fields_set:
            raise BadRequest("json_schema.schema: is missing", "json_schema.schema")
        return self


class Sampled(Asked):
    """What all requests for text share."""

    model: Word
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="only the k best; 0 or -1: all")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,10}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            few(MOST_BIASES),
            Field(max_length=MOST_BIASES),
        ]
        | None
    ) = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = Field(None, ge=-100, le=100, description="lower is sooner")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    user: Word | None = None

    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def ends(self, own: tuple[int, ...]) -> tuple[int, ...]:
        """The model's own ids that end an answer, as far as they do."""
        return () if self.ignore_eos else own

    def settings(
        self, limit: int, vocab: int, ends: tuple[int, ...], seed: int, ranked: bool
    ) -> Settings:
        """For one answer of at most `limit` tokens that the model's `ends` end. Raises BadRequest
        for ids that the model lacks."""
        stops = tuple(dict.fromkeys((*self.ends(ends), *(self.stop_token_ids or ()))))
        biases = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        for name, ids in (("stop_token_ids", stops), ("logit_bias", biases)):
            outside = [token for token in ids if token >= vocab]
            if outside:
                raise BadRequest(
                    f"{name} has token {outside[0]}; the model's vocabulary is 0 to {vocab - 1}",
                    name,
                )
        if len(stops) > MOST_STOPS:
            raise BadRequest(
                f"{len(stops)} tokens would end an answer, the model's own {len(ends)} among them; "
                f"{MOST_STOPS} may: give fewer stop_token_ids",
                "stop_token_ids",
            )
        return Settings(
            limit=limit,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            presence=self.presence_penalty or 0.0,
            frequency=self.frequency_penalty or 0.0,
            repetition=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=seed % 2**32,
            stops=stops,
            biases=biases,
            ranked=ranked,
        )


Ids = Annotated[list[Id], Field(max_length=2**20, fail_fast=True)]
Prompts = (
    Annotated[list[Text], Field(max_length=MOST_PROMPTS, fail_fast=True)]
    | Annotated[list[Ids], Field(max_length=MOST_PROMPTS, fail_fast=True)]
)


class Completion(Sampled):
    """Body of `/v1/completions`."""

    prompt: Text | Ids | Prompts
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=MOST_RANKED)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES)
    suffix: Text | None = None
    response_format: ResponseFormat | None = None

    @pydantic.model_validator(mode="after")
    def _possible(self) -> "Completion":
        if self.suffix:
            raise BadRequest("suffix: text cannot be filled in; leave suffix out", "suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise BadRequest(
                "best_of: must equal n, as no answers are ranked; leave it out", "best_of"
            )
        return self


class Said[Kind](Asked):
    """A part of what is said: some kind of text, or of type refusal."""

    type: Kind
    text: Text | None = None
    refusal: Text | None = None

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "Said[Kind]":
        if self._told is None:
            name = "refusal" if self.type == "refusal" else "text"
            raise BadRequest(f"{name}: is missing", name)
        return self

    @property
    def _told(self) -> str | None:
        return self.refusal if self.type == "refusal" else self.text

    def __str__(self) -> str:
        return self._told or ""


class Part(Said[Literal["text", "refusal"]]):
    """A part of a message's content; only text can be read."""


class Function(Asked):
    """A function that a tool names, or that was called."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.\-]{1,64}$")]
    description: Text | None = None
    parameters: Plain | None = None
    strict: bool | None = None


class Tool(Asked):
    """A tool that may be called."""

    type: Literal["function"]
    function: Function


class Called(Asked):
    """A function with the arguments that it was called with, as JSON text."""

    name: Annotated[str, Field(max_length=64)]
    arguments: Text


class ToolCall(Asked):
    """A call in an earlier answer."""

    id: Word
    type: Literal["function"] = "function"
    function: Called


class Message(Asked):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(max_length=256, fail_fast=True)] | None = None
    name: Word | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = (
        None
    )
    tool_call_id: Word | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None

    @pydantic.model_validator(mode="after")
    def _something(self) -> "Message":
        own = self.role == "assistant"
        if self.content is None and not (own and (self.tool_calls or self.refusal)):
            raise BadRequest("content: is missing", "content")
        parts = self.content if isinstance(self.content, list) else ()
        if not own and any(part.type == "refusal" for part in parts):
            raise BadRequest("content: has a refusal, which only an assistant's may", "content")
        return self

    @property
    def text(self) -> str:
        """The content, its parts one after the other."""
        parts = self.content
        if isinstance(parts, list):
            return "".join(map(str, parts))
        return parts or self.refusal or ""


Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]


class NamedFunction(Asked):
    """The function that is to be called."""

    name: Annotated[str, Field(max_length=64)]


class NamedTool(Asked):
    """The tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class Chat(Sampled):
    """Body of `/v1/chat/completions`."""

    messages: Messages
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_RANKED)
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Word | None = None
    chat_template_kwargs: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], bool | int | float | Word],
            few(MOST_KWARGS),
            Field(max_length=MOST_KWARGS),
        ]
        | None
    ) = None

    @pydantic.model_validator(mode="after")
    def _possible(self) -> "Chat":
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs: needs logprobs = true", "top_logprobs")
        chosen = self.tool_choice
        if chosen not in (None, "none", "auto") and not self.tools:
            raise BadRequest("tool_choice: needs tools", "tool_choice")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(chosen, NamedTool) and chosen.function.name not in names:
            raise BadRequest(
                f"tool_choice: {chosen.function.name} is not among the tools", "tool_choice"
            )
        return self


class Embeddings(Asked):
    """Body of `/v1/embeddings`."""

    model: Word
    input: (
        Text
        | Ids
        | Annotated[list[Text], Field(max_length=MOST_INPUTS, fail_fast=True)]
        | Annotated[list[Ids], Field(max_length=MOST_INPUTS, fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, lt=2**31)
    pooling: Literal["mean", "last"] | None = Field(None, description="mean by default")
    priority: int | None = Field(None, ge=-100, le=100)
    user: Word | None = None


class Tokenize(Asked):
    """Body of `/tokenize`: a prompt, or messages."""

    model: Word | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_generation_prompt: bool = True

    @pydantic.model_validator(mode="after")
    def _one(self) -> "Tokenize":
        if (self.prompt is None) == (self.messages is None):
            raise BadRequest("prompt: give either prompt or messages", "prompt")
        return self


class Detokenize(Asked):
    """Body of `/detokenize`."""

    model: Word | None = None
    tokens: Ids


def refusal(errors: Sequence[Mapping[str, Any]], body: Any) -> BadRequest:
    """What pydantic found wrong with a body, in one sentence about one of its fields: of a union
    that of the type which it comes nearest to."""
    if errors[0]["type"] == "json_invalid":
        where, what = errors[0]["loc"][-1], errors[0]["ctx"]["error"]
        return BadRequest(f"the body is no JSON: {what} at character {where}")
    if not isinstance(body, dict):
        told = "missing" if body is None else "no JSON object with content-type application/json"
        return BadRequest(f"the body is {told}")
    errors = [error for error in errors if error["type"] == "too_long"] or errors  # the rest fits
    places = [_place(error, body) for error in errors]
    place = max(places, key=lambda at: (len(at), [part for part in at if isinstance(part, int)]))
    said = [error["msg"] for error, at in zip(errors, places, strict=True) if at == place]
    last, param = str(place[-1] if place else ""), ".".join(str(part)[:64] for part in place)
    said = [one.removeprefix("Value error, ").removeprefix(f"{last}: ") for one in said]
    message = " or ".join(dict.fromkeys(said))[:500]
    return BadRequest(f"{param}: {message}" if param else message, param or None)


def _place(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """The names that lead to what is wrong. Pydantic lists types of unions among them."""
    place, here = [], body
    for part in error["loc"][1:]:
        known = isinstance(here, dict) and part in here
        known |= isinstance(here, list) and isinstance(part, int) and part < len(here)
        if known:
            here = here[part]
            place.append(part)
    if error["type"] == "missing":
        place.append(error["loc"][-1])
    wrong = error.get("ctx", {}).get("error")
    return [*place, wrong.param] if isinstance(wrong, BadRequest) and wrong.param else place
