"""`Run`: everything a recipe says, typed and frozen. Each part is declared by the room that uses
it."""

import difflib
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import pydantic

from ropewalk.checkpoint import manager
from ropewalk.core.config import Config, override, read_yaml
from ropewalk.core.errors import ConfigError
from ropewalk.data import pipeline
from ropewalk.losses.next_token import NextToken
from ropewalk.metrics import writers
from ropewalk.optim.optimizer import Optimizer
from ropewalk.transforms.layout import Layout


class Tokenizer(Config):
    """Where ids come from; a bare string is the `path`."""

    path: str | None = None
    """`byte`, a tokenizer file, or a directory with one; by default that of the model's `path`"""
    bpe: int | None = pydantic.Field(default=None, gt=0)
    """train a byte-level BPE of this many tokens on the training text, kept in the run directory"""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _by_path(cls, values: Any) -> Any:
        return {"path": values} if isinstance(values, str) else values

    @pydantic.model_validator(mode="after")
    def _one(self) -> "Tokenizer":
        if self.path is not None and self.bpe is not None:
            raise ValueError("give `path` or `bpe`, not both")
        return self


class Evaluate(Config):
    """Loss, perplexity and bits per byte on what the data holds out."""

    every: int | None = pydantic.Field(default=None, ge=1)
    """steps between evaluations; by default only at the end"""
    target_loss: float | None = pydantic.Field(default=None, gt=0)
    """end the run once the held-out loss, in nats a token, is at most this"""


class Samples(Config):
    """Texts the model writes while it learns."""

    every: int | None = pydantic.Field(default=None, ge=1)
    """steps between samples; by default none are written"""
    prompts: tuple[str, ...] = ("",)
    max_new_tokens: int = pydantic.Field(default=64, ge=1)
    temperature: float = pydantic.Field(default=0.8, ge=0)


class Checkpoint(manager.Config):
    """When to save, and what stays."""

    every: int = pydantic.Field(default=500, ge=1)
    """steps between checkpoints; the last step is always saved"""


class Run(Config):
    """A training run."""

    model: dict[str, Any]
    """`preset` (or its bare name) or `family` with its config (Hugging Face's names), or `path` of
    a model to start from"""
    tokenizer: Tokenizer = Tokenizer()
    data: pipeline.Config
    objective: NextToken = NextToken()
    optimizer: Optimizer = Optimizer()
    steps: int = pydantic.Field(ge=1)
    accumulate: int = pydantic.Field(default=1, ge=1)
    """micro-batches that a batch is cut into; the gradient stays that of the whole batch"""
    precision: Literal["float32", "bfloat16", "mixed"] = "float32"
    """of weights and arithmetic; mixed keeps float32 weights and computes in bfloat16"""
    layout: Layout = Layout()
    seed: int = pydantic.Field(default=0, ge=0, lt=2**31)
    evaluate: Evaluate = Evaluate()
    samples: Samples = Samples()
    checkpoint: Checkpoint = Checkpoint()
    metrics: writers.Config = writers.Config()
    stop_after_skipped: int = pydantic.Field(default=10, ge=1)
    """updates dropped in a row, for a loss or gradient that is not finite, that end the run"""
    export: Literal["none", "float32", "bfloat16", "float16"] = "none"
    """dtype of the Hugging Face directory written at the end, in `hf/` of the run directory"""
    directory: str
    """of the run; by default runs/ and the recipe's name"""

    @property
    def weights_dtype(self) -> str:
        """How weights are kept; the optimizer's state is float32."""
        return "bfloat16" if self.precision == "bfloat16" else "float32"

    @property
    def compute_dtype(self) -> str:
        """What products are computed in."""
        return "float32" if self.precision == "float32" else "bfloat16"


# What a bare value stands for where a recipe may give one in place of a mapping.
_SHORTHANDS = {"layout": "rules", "model": "preset", "tokenizer": "path"}


def read(recipe: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Run:
    """The run that a recipe (a file, or the name of a bundled one) and `key=value` overrides
    describe.

    Raises ConfigError naming file, key and fix.
    """
    path = find(recipe)
    values = override(read_yaml(path), overrides, _SHORTHANDS)
    values.setdefault("directory", str(Path("runs") / path.stem))
    return Run.parse(values, str(recipe))


def find(recipe: str | os.PathLike[str]) -> Path:
    """The file of a recipe. Raises ConfigError, with the nearest bundled name, when there is
    none."""
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    bundled = {
        file.stem: file
        for file in sorted(Path(str(resources.files("ropewalk") / "recipes")).glob("*.yml"))
    }
    if str(recipe) in bundled:
        return bundled[str(recipe)]
    near = difflib.get_close_matches(str(recipe), bundled, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"bundled recipes: {', '.join(bundled)}"
    raise ConfigError(f"recipe `{recipe}` is neither a file nor a bundled recipe; {hint}")
