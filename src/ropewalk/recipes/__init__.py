"""Recipes and the corpus that come with the package, found by name. Knows nothing of what they
say."""

import difflib
from pathlib import Path

from ropewalk.core.errors import ConfigError
from ropewalk.data.source import bundled

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The bundled recipes."""
    return sorted(file.stem for file in _FOLDER.glob("*.yml"))


def find(name: str) -> Path:
    """The file of a recipe: a path as it is, or the name of a bundled one. Raises ConfigError.

    A name that is both a file here and a bundled recipe means the bundled one; write `./name` for
    the file.
    """
    inside = _FOLDER / f"{name}.yml"
    if name in names():
        return inside
    if Path(name).is_file():
        return Path(name)
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"bundled are {', '.join(names()) or 'none'}"
    raise ConfigError(f"recipe `{name}` is neither a file nor the name of a bundled recipe; {hint}")


def corpus(name: str) -> Path:
    """The file of a bundled corpus. Raises DataError naming those that exist."""
    return bundled(name)
