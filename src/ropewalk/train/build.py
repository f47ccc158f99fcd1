"""From a recipe to the things a run is made of: model, data, optimizer, placement, and the compiled
step."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ropewalk import models
from ropewalk.checkpoint import pretrained
from ropewalk.core.config import read_yaml
from ropewalk.core.errors import ConfigError, DataError, LayoutError
from ropewalk.core.paths import Spec
from ropewalk.data import pipeline
from ropewalk.data.holdout import Heldout
from ropewalk.layers.lm import parameters, table
from ropewalk.parallel.axes import Placement, batch_sharding, replicated
from ropewalk.text import bpe
from ropewalk.text import tokenizer as tokenizers
from ropewalk.text.tokenizer import Tokenizer
from ropewalk.train import state as states
from ropewalk.train.evaluate import MEASURES, Evaluator
from ropewalk.train.run import Run
from ropewalk.train.state import State
from ropewalk.train.step import Step, make_step

RECIPE = "recipe.yml"
BATCH_DTYPES = {
    "tokens": "int32",
    "targets": "int32",
    "positions": "int32",
    "segment_ids": "int32",
    "weights": "float32",
}


@dataclasses.dataclass(frozen=True)
class Built:
    """A run's parts, none of which changes while it runs."""

    run: Run
    named: models.Named
    structure: Any
    placement: Placement
    optimizer: optax.GradientTransformation
    tokenizer: Tokenizer | None
    batches: pipeline.Batches
    heldout: Heldout | None
    start: pretrained.Source | None

    @property
    def directory(self) -> Path:
        """Of the run."""
        return Path(self.run.directory)

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe, the model's every number in it."""
        return {**self.run.model_dump(mode="json"), "model": self.model}

    @property
    def model(self) -> dict[str, Any]:
        """The model as a recipe could name it."""
        return {"family": self.named.config.family(), **self.named.config.model_dump(mode="json")}

    @property
    def table(self) -> dict[str, Spec]:
        """Every parameter's path, shape, dtype and axes."""
        return table(self.structure)

    @property
    def frozen(self) -> list[str]:
        """The paths of weights that no optimizer touches."""
        return [path for path, spec in self.table.items() if not spec.trained]

    def fresh(self) -> State:
        """The state before the first step, with random weights; traceable."""
        return self.begun(parameters(_module(self.named, self.run, self.placement)))

    def begun(self, params: dict[str, jax.Array]) -> State:
        """The state before the first step, with the weights given; traceable."""
        return states.fresh(params, self.optimizer, self.run.weights_dtype, self.frozen)

    @functools.cached_property
    def described(self) -> State:
        """Shape, dtype and sharding of every leaf of the state."""
        abstract = jax.eval_shape(self.fresh)
        where = states.place(abstract, self.table, self.placement)
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract,
            where,
        )

    @property
    def where(self) -> State:
        """The sharding of every leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.described)

    def step(self) -> Step:
        """One update, `(state, batch) -> (state, metrics)`; traceable."""
        run = self.run
        return make_step(
            self.structure,
            run.objective,
            self.optimizer,
            self.placement,
            rate=run.optimizer.schedule.build(run.optimizer.learning_rate, run.steps),
            accumulate=run.accumulate,
            seed=run.seed,
            post_update=run.optimizer.post_update(self.table),
        )

    def compile_step(self) -> Any:
        """The step, compiled before the first batch, with the state donated."""
        run = self.run
        shape = run.data.batch_size, run.data.length
        sharding = batch_sharding(self.placement, run.data.batch_size)
        batch = {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=sharding)
            for name, kind in BATCH_DTYPES.items()
        }
        out = (self.where, replicated(self.placement))
        compiled = jax.jit(self.step(), donate_argnums=0, out_shardings=out)
        return compiled.lower(self.described, batch).compile()

    def place(self, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch, as arrays over the whole mesh."""
        size = self.run.data.batch_size
        sharding = batch_sharding(self.placement, size)
        return {
            name: jax.make_array_from_process_local_data(sharding, rows, (size, rows.shape[1]))
            for name, rows in arrays.items()
        }

    def evaluator(self) -> Evaluator | None:
        """The held-out split's evaluator, if the recipe holds anything out."""
        if self.heldout is None or self.tokenizer is None:
            return None
        sizes = self.tokenizer.token_bytes()
        return Evaluator(
            self.structure,
            self.run.objective,
            self.placement,
            self.heldout,
            sizes,
        )


def build(run: Run) -> Built:
    """Everything a run needs, checked against each other. Raises a UserError that names the keys to
    change."""
    placement = run.layout.place()
    _divides(run, placement)
    start = _start(run)
    tokenizer = tokenizer_of(run, start)
    process, processes = _rows_of(placement, run.data.batch_size)
    batches = pipeline.Batches(run.data, tokenizer, process, processes)
    named = _named(run, start, tokenizer)
    config = named.config
    if batches.max_token_id >= config.vocab_size:
        set_it = "" if start else f"set it to {batches.max_token_id + 1} or more, or "
        raise DataError(
            f"the data has token ids up to {batches.max_token_id} and model.vocab_size is "
            f"{config.vocab_size}; {set_it}use a tokenizer of the model's own vocabulary"
        )
    if run.data.length > config.max_position_embeddings:
        raise ConfigError(
            f"data.length = {run.data.length} is longer than model.max_position_embeddings = "
            f"{config.max_position_embeddings}; shorten the one or raise the other"
        )
    _evaluable(run, config.max_position_embeddings)
    heldout = None
    if run.data.holdout is not None and tokenizer is not None:
        heldout = Heldout(run.data, tokenizer, None, process, processes)
    structure = jax.eval_shape(lambda: _module(named, run, placement))
    optimizer = run.optimizer.build(run.steps, table(structure))
    run.optimizer.post_update(table(structure))  # refuses what the model cannot do
    return Built(run, named, structure, placement, optimizer, tokenizer, batches, heldout, start)


def model_of(run: Run) -> models.Named:
    """Family and config of a run's model, without reading any data but what its tokenizer needs."""
    start = _start(run)
    return _named(run, start, None if start or "vocab_size" in run.model else tokenizer_of(run))


def tokenizer_of(run: Run, start: pretrained.Source | None = None) -> Tokenizer | None:
    """The run's tokenizer: kept from its start, or made as the recipe says; nothing is written.
    `start` is the model it begins from, where that is already open."""
    if keeps_tokenizer(run):
        return tokenizers.load(Path(run.directory) / pretrained.TOKENIZER)
    if run.tokenizer.path is not None:
        return tokenizers.load(run.tokenizer.path)
    if run.tokenizer.bpe is not None:
        return bpe.train(pipeline.texts(run.data), run.tokenizer.bpe)
    start = start or _start(run)
    return start.tokenizer() if start else None


def keeps_tokenizer(run: Run) -> bool:
    """Whether the run directory holds the tokenizer that this recipe and no other asked for."""
    recipe, home = Path(run.directory) / RECIPE, Path(run.directory) / pretrained.TOKENIZER
    named = run.tokenizer.model_dump(mode="json")
    return home.is_dir() and recipe.is_file() and read_yaml(recipe).get("tokenizer") == named


def _start(run: Run) -> pretrained.Source | None:
    return pretrained.find(run.model["path"]) if "path" in run.model else None


def _module(named: models.Named, run: Run, placement: Placement) -> Any:
    model = named.family.Model(named.config, rngs=nnx.Rngs(run.seed))
    model.embed.dtype = run.compute_dtype
    return run.layout.apply(model, placement)


def _named(run: Run, start: pretrained.Source | None, tokenizer: Tokenizer | None) -> models.Named:
    """Family and config. A vocabulary that is not given is the tokenizer's; a preset's own goes
    with a tokenizer from elsewhere, which it may be padded for."""
    if start is not None:
        changes = sorted(set(run.model) - {"path"})
        if changes:
            raise ConfigError(
                f"model: `{changes[0]}` cannot be changed in a model that is loaded from `path`; "
                "remove it"
            )
        return start.named
    values = dict(run.model)
    own = "family" in values or run.tokenizer.path in (None, "byte")
    if own and "vocab_size" not in values and tokenizer is not None:
        values["vocab_size"] = tokenizer.vocab_size
    return models.from_recipe(values)


def _evaluable(run: Run, positions: int) -> None:
    """Refuses evaluation of nothing, and samples that no position is left for."""
    wanted = {"every": run.evaluate.every, "target_loss": run.evaluate.target_loss}
    asked = [f"evaluate.{key}" for key, value in wanted.items() if value is not None]
    if run.data.holdout is None and asked:
        raise ConfigError(f"{asked[0]} is set and data.holdout is not: nothing is held out for it")
    best = run.checkpoint.best_metric
    if best is not None and best not in MEASURES:
        raise ConfigError(
            f"checkpoint.best_metric = {best}: no evaluation gives that; it gives "
            f"{', '.join(MEASURES)}"
        )
    if run.samples.every and run.samples.max_new_tokens >= positions:
        raise ConfigError(
            f"samples.max_new_tokens = {run.samples.max_new_tokens} leaves no room for a prompt in "
            f"the model's {positions} positions; lower it"
        )


def _divides(run: Run, placement: Placement) -> None:
    size, parts = run.data.batch_size, run.accumulate
    if size % parts:
        raise ConfigError(
            f"data.batch_size = {size} does not divide into accumulate = {parts} micro-batches"
        )
    ways = size // batch_sharding(placement, size).shard_shape((size, 1))[0]
    if size // parts % ways:
        raise LayoutError(
            f"data.batch_size = {size} in accumulate = {parts} micro-batches leaves "
            f"{size // parts} sequences for {ways} devices; set data.batch_size to a multiple of "
            f"{parts * ways}, or change accumulate or layout.mesh"
        )


def _rows_of(placement: Placement, size: int) -> tuple[int, int]:
    """Which share of a batch's rows lies on this process's devices, as (share, of how many)."""
    index = batch_sharding(placement, size).addressable_devices_indices_map((size, 1))
    rows = [entry[0] if entry else slice(None) for entry in index.values()]
    first = min(row.start or 0 for row in rows)
    last = max(size if row.stop is None else row.stop for row in rows)
    count = last - first
    if size % count or first % count:
        raise ConfigError(
            f"layout.mesh gives this process rows {first} to {last} of {size}, which is no even "
            "share"
        )
    return first // count, size // count
