"""Families of models, one file each, found by file name: a new file is a new family and nothing
else changes."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any, NamedTuple

from ropewalk.core.config import Config
from ropewalk.core.errors import ConfigError, ModelError


class Named(NamedTuple):
    """A family's module and one config of it."""

    family: Any
    config: Any


def families() -> list[str]:
    """The names of all families, which are Hugging Face's `model_type`s."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def family(name: str) -> Any:
    """The module of a family: Config, PRESETS, Block, Model, WEIGHTS. Raises ModelError for an
    unknown one."""
    if name not in families():
        raise ModelError(
            f"model_type `{name}` is not supported; supported: "
            f"{', '.join(families())}{near(name, families())}"
        )
    return importlib.import_module(f"{__name__}.{name}")


def presets() -> dict[str, Named]:
    """Every family's named configs."""
    modules = [family(name) for name in families()]
    return {
        name: Named(module, config) for module in modules for name, config in module.PRESETS.items()
    }


def from_hf(values: dict[str, Any], source: str) -> Named:
    """Family and config of a parsed `config.json`. Raises ModelError."""
    name, text = values.get("model_type"), values.get("text_config")
    if not isinstance(name, str):
        raise ModelError(f"{source}: has no `model_type`; supported: {', '.join(families())}")
    if name not in families() and isinstance(text, dict) and "model_type" in text:
        return from_hf(text, f"{source}: text_config")  # the language part of a larger model
    other = [m for m in map(family, families()) if name in getattr(m, "ALSO", ())]
    module = other[0] if other else family(name)
    return Named(module, module.Config.from_hf(values, source))


def from_gguf(architecture: str, source: str) -> Any:
    """The module of the family that GGUF files call `architecture`. Raises ModelError where nobody
    has checked what its files say."""
    modules = {module.Config.gguf_architecture: module for module in map(family, families())}
    modules.pop("", None)
    if architecture not in modules:
        raise ModelError(
            f"{source}: GGUF files of `{architecture}` models are not supported; supported: "
            f"{', '.join(sorted(modules))}; use its Hugging Face directory"
        )
    return modules[architecture]


def from_recipe(values: dict[str, Any]) -> Named:
    """Family and config of a recipe's `model`: `{preset: NAME, ...changes}` or `{family: NAME,
    ...its config}`.

    Raises ConfigError naming the key, with the nearest known name.
    """
    values = dict(values)
    preset, name = values.pop("preset", None), values.pop("family", None)
    if preset is not None:
        known = presets()
        if preset not in known:
            raise ConfigError(
                f"model.preset `{preset}` is not known{near(preset, known)}; presets: "
                f"{', '.join(known)}"
            )
        module, config = known[preset]
        if name is not None and name != config.family():
            raise ConfigError(
                f"model.preset `{preset}` is of the family {config.family()} and model.family is "
                f"{name}; remove one of them"
            )
        return Named(module, module.Config.parse({**config.model_dump(), **values}, "model"))
    if name is None:
        raise ConfigError(
            "model: name a `preset`, a `family` with its sizes, or a `path` to start from"
        )
    module = family(name)
    config_class: type[Config] = module.Config
    return Named(module, config_class.parse(values, "model"))


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the known name that is nearest, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean `{found[0]}`?" if found else ""
