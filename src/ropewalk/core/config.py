"""Frozen, typed configuration: YAML in, dotted overrides, a misspelt key answered with the nearest
one.

Knows nothing of what the keys mean; every room declares its own `Config` subclasses.
"""

import difflib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin

import pydantic
import yaml

from ropewalk.core.errors import ConfigError


class Config(pydantic.BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    @classmethod
    def parse(cls, values: dict[str, Any], source: str = "the configuration") -> Self:
        """Validates `values` and returns the config. Raises ConfigError naming `source`, the key
        and the fix.

        `source` is the file they come from, or a name for it; validators find it in their context.
        """
        try:
            return cls.model_validate(values, context={"source": source})
        except pydantic.ValidationError as error:
            raise ConfigError(_explain(cls, error, source)) from None

    def changes(self, base: "Config | None" = None) -> dict[str, Any]:
        """The values that differ from `base` (by default: from the declared defaults), nested like
        the recipe."""
        mine = self.model_dump(mode="json")
        if base is None:
            return self.model_dump(mode="json", exclude_defaults=True)
        return _difference(mine, base.model_dump(mode="json"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping from a file. Raises ConfigError with file, line and column when it
    cannot."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: a recipe is a mapping of keys to values, this is a {type(values).__name__}"
        )
    return values


def override(
    values: dict[str, Any], assignments: Sequence[str], shorthands: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Returns `values` with `key.sub=value` assignments applied; each value is read as YAML.

    `shorthands` (`{"layout": "rules"}`) names the key that a bare text stands for. Any other scalar
    where an assignment needs a mapping gives way to one.
    """
    shorthands = shorthands or {}
    result = _copied(values)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"override `{assignment}` is not of the form key=value, e.g. "
                "optimizer.learning_rate=1e-3"
            )
        *parents, last = key.strip().split(".")
        place = result
        for parent in parents:
            if place is result:
                _open(result, parent, shorthands)
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[last] = _scalar(text)
    for key in shorthands:
        _open(result, key, shorthands)
    return result


def leaf_fields(config: type[Config], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf key of a config class as (dotted name, annotation), nested configs opened."""
    for name, field in config.model_fields.items():
        nested = list(_nested(field.annotation))
        for inner in nested:
            yield from leaf_fields(inner, f"{prefix}{name}.")
        if not nested:
            yield f"{prefix}{name}", field.annotation


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _open(values: dict[str, Any], key: str, shorthands: Mapping[str, str]) -> None:
    if key in shorthands and isinstance(values.get(key), str):
        values[key] = {shorthands[key]: values[key]}


def _scalar(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(
        value, str
    ):  # YAML 1.1 reads 1e-3 as a string; a recipe's author means the number
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _copied(values: Any) -> Any:
    return (
        {key: _copied(value) for key, value in values.items()}
        if isinstance(values, dict)
        else values
    )


def _difference(mine: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in mine.items():
        other = base.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            inner = _difference(value, other)
            if inner:
                result[key] = inner
        elif value != other:
            result[key] = value
    return result


def _nested(annotation: Any) -> Iterator[type[Config]]:
    """Config classes named by an annotation, through unions and Annotated but not through
    containers."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType):
        for option in get_args(annotation):
            yield from _nested(option)


def _explain(cls: type[Config], error: pydantic.ValidationError, source: str) -> str:
    known = [name for name, _ in leaf_fields(cls)]
    lines: dict[str, str] = {}  # a union reports a value once for each of its members
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines[key] = _unknown_key(key, known)
        elif item["type"] == "missing":
            lines[key] = f"key `{key}` is required"
        else:
            loc, annotation = _declared(cls, item["loc"])
            key = ".".join(str(part) for part in loc)
            if any(told.startswith(f"{key}.") for told in lines if key):
                continue  # what is wrong inside has been told
            message = _shape(item, loc, annotation)
            message = message or item["msg"].removeprefix("Value error, ")
            line = f"key `{key}` = {item['input']!r}: {message}" if key else message
            lines.setdefault(key, line)
    return f"{source}: " + "; ".join(list(lines.values())[:5])


def _declared(cls: type[Config], loc: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], Any]:
    """The part of an error's place that a person wrote, members of unions left out, and the
    annotation of what stands there."""
    written: list[int | str] = []
    found: Any = cls
    for part in loc:
        inner = _inner(found, part)
        if inner is not None or get_origin(found) not in (Union, UnionType):
            written, found = [*written, part], inner
    return tuple(written), found


def _inner(annotation: Any, part: int | str) -> Any:
    """What stands under a key or an index of what an annotation describes; None if nothing may."""
    origin, options = get_origin(annotation), get_args(annotation)
    if isinstance(part, int):
        if origin is tuple:
            return options[0]
    elif origin is dict:
        return options[1]
    elif isinstance(annotation, type) and issubclass(annotation, Config):
        field = annotation.model_fields.get(part)
        return field.annotation if field else None
    if origin in (Union, UnionType):
        return next(filter(None, (_inner(option, part) for option in options)), None)
    return None


def _shape(item: Any, loc: tuple[int | str, ...], annotation: Any) -> str | None:
    """A list or a mapping that is none, or is too short, in words: with an example made from the
    value that was given where that makes a valid one, else with the keys there are."""
    if item["type"] == "too_short":
        return f"at least {item['ctx']['min_length']} of them is needed"
    mapping = item["type"] in ("dict_type", "model_type")
    if not mapping and item["type"] not in ("tuple_type", "list_type"):
        return None
    value = item["input"]
    options = list(_nested(annotation if mapping else _inner(annotation, 0)))
    keys = list(dict.fromkeys(name for option in options for name in option.model_fields))
    what = "a mapping" if mapping else "a list of mappings" if keys else "a list"
    mappings = [{key: value} for key in keys]
    for candidate in mappings if mapping else [[part] for part in (value, *mappings)]:
        try:
            pydantic.TypeAdapter(annotation).validate_python(candidate)
        except pydantic.ValidationError:
            continue
        text = yaml.safe_dump(candidate, default_flow_style=True, width=1000).strip()
        if not any(isinstance(part, int) for part in loc):  # nothing assigns to a list's entry
            text = shlex.quote(f"{'.'.join(map(str, loc))}={text}")
        return f"{what} is expected, e.g. {text}"
    return f"{what}{f' with the keys {", ".join(keys)}' if keys else ''} is expected"


def _unknown_key(key: str, known: list[str]) -> str:
    sections = {name.rpartition(".")[0] for name in known} - {""}
    options = sorted({*known, *sections})
    near = difflib.get_close_matches(key, options, n=1, cutoff=0.5)
    if not near:
        by_last = {name.rpartition(".")[2]: name for name in reversed(options)}
        last = difflib.get_close_matches(key.rpartition(".")[2], list(by_last), n=1)
        near = [by_last[last[0]]] if last else []
    hint = (
        f"did you mean `{near[0]}`?"
        if near
        else "`ropewalk train RECIPE --print-config all` lists every key"
    )
    return f"unknown key `{key}`; {hint}"
