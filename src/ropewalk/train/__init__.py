"""Training: a recipe becomes a `Run`, a run a model, a state and one compiled step.

The room is itself callable, so that `ropewalk.train("tiny")` trains.
"""

import os
import sys
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ropewalk.core.errors import ConfigError

if TYPE_CHECKING:
    from ropewalk.train.loop import Result


class _Train(types.ModuleType):
    def __call__(self, recipe: str | os.PathLike[str], overrides: Sequence[str] = ()) -> "Result":
        """Trains a recipe (a file, or the name of a bundled one) with `key=value` overrides. Raises
        a UserError."""
        if not isinstance(recipe, str | os.PathLike):
            raise ConfigError(f"a recipe is named by a text or a path, not by {recipe!r:.80}")
        listed = isinstance(overrides, list | tuple)
        if not listed or not all(isinstance(override, str) for override in overrides):
            raise ConfigError(
                f"overrides is {overrides!r:.80}; give a list of texts, e.g. "
                '["optimizer.learning_rate=1e-3"]'
            )
        from ropewalk.train import loop, run  # start-up time: they import jax

        return loop.train(run.read(recipe, overrides))


sys.modules[__name__].__class__ = _Train
