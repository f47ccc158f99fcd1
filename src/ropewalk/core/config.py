"""Frozen, typed configuration: YAML in, dotted overrides, a misspelt key answered with the nearest
one.

Knows nothing of what the keys mean; every room declares its own `Config` subclasses.
"""

import difflib
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
        and the fix."""
        try:
            return cls.model_validate(values)
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

    A scalar that stands where an assignment needs a mapping becomes one: under the key that
    `shorthands` names for it (`{"layout": "rules"}`), else an empty one.
    """
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
            if not isinstance(place.get(parent), dict):
                under = (shorthands or {}).get(parent)
                known = under is not None and place.get(parent) is not None
                place[parent] = {under: place[parent]} if known else {}
            place = place[parent]
        place[last] = _scalar(text)
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
    lines = []
    for item in error.errors()[:5]:
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(_unknown_key(key, known))
        elif item["type"] == "missing":
            lines.append(f"key `{key}` is required")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"key `{key}` = {item['input']!r}: {message}" if key else message)
    return f"{source}: " + "; ".join(lines)


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
