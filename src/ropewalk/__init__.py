"""One NNX model definition, from random weights to a served model.

`load` and `train` are all a script needs; importing this module imports nothing heavy.
"""

from typing import TYPE_CHECKING, Any

from ropewalk import train

if TYPE_CHECKING:
    from ropewalk.checkpoint.pretrained import load

__all__ = ["load", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from ropewalk.checkpoint.pretrained import (
            load,
        )  # start-up time: jax is imported when first needed

        return load
    raise AttributeError(f"module `ropewalk` has no attribute `{name}`")
