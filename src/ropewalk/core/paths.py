"""Paths that name the leaves of a tree, e.g. `layers.segments.0.0.attention.query.weight`."""

import dataclasses
import fnmatch
from collections.abc import Iterable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a parameter before it exists: shape, dtype and one logical axis name a
    dimension."""

    shape: tuple[int, ...]
    dtype: jax.numpy.dtype
    axes: tuple[str | None, ...]
    trained: bool = True
    """false for what no optimizer touches"""

    def held_in(self, dtype: Any) -> Any:
        """The dtype of the parameter in a model held in `dtype`: its own if it is not trained."""
        return dtype if self.trained else self.dtype


def dotted(key_path: Iterable[Any]) -> str:
    """A jax key path as a dotted string; the trailing `.value` of a variable is left out."""
    parts = [_part(key) for key in key_path]
    return ".".join(parts[:-1] if parts and parts[-1] == "value" else parts)


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by dotted path, in tree order."""
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(template: Any, leaves: dict[str, Any]) -> Any:
    """The tree shaped like `template` with each leaf taken from `leaves` by its path. Raises
    KeyError."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[dotted(path)], template)


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a path matches any of the glob patterns (`*` crosses dots)."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _part(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
