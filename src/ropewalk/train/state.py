"""The train state: flat dicts of arrays, never the module. What shape it has, where it lies, how it
starts."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ropewalk.core.paths import Spec, flatten, unflatten
from ropewalk.parallel.axes import Placement, placed, replicated, shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes from step to step, and the weights that do not."""

    params: dict[str, jax.Array]
    """trainable, by path"""
    frozen: dict[str, jax.Array]
    """what no optimizer touches, by path"""
    opt_state: Any
    step: jax.Array
    """int32: batches seen"""
    extra: dict[str, jax.Array]
    """`skipped` and `skipped_in_a_row`: int32 counts of updates dropped for a non-finite loss or
    gradient"""

    @property
    def weights(self) -> dict[str, jax.Array]:
        """All of the model's, by path."""
        return self.params | self.frozen

    def tree(self) -> dict[str, Any]:
        """The state as nested dicts of arrays by path: the layout of a checkpoint."""
        fields = {
            "params": self.params,
            "frozen": self.frozen,
            "extra": self.extra,
            "step": self.step,
        }
        return {**fields, "opt_state": flatten(self.opt_state)}

    def filled(self, tree: dict[str, Any]) -> "State":
        """A state of this structure from what `tree` returned."""
        opt_state = unflatten(self.opt_state, tree["opt_state"])
        return State(tree["params"], tree["frozen"], opt_state, tree["step"], tree["extra"])


def fresh(
    weights: dict[str, jax.Array],
    optimizer: optax.GradientTransformation,
    dtype: Any,
    frozen: Collection[str] = (),
) -> State:
    """The state before the first step, with trained weights of `dtype`; traceable. `frozen` are the
    paths of those that no optimizer touches; they stay as they are.

    The optimizer's state is float32 like its gradients: a bfloat16 mean of squares stands still
    once its changes fall below 0.4 %.
    """
    kept = {path: value for path, value in weights.items() if path in frozen}
    params = {path: value.astype(dtype) for path, value in weights.items() if path not in frozen}
    opt_state = optimizer.init({path: value.astype(jnp.float32) for path, value in params.items()})
    zero = jnp.zeros((), jnp.int32)
    return State(params, kept, opt_state, zero, {"skipped": zero, "skipped_in_a_row": zero})


def place(abstract: State, table: Mapping[str, Spec], placement: Placement) -> State:
    """The sharding of every leaf of a state: a leaf of the optimizer lies like the parameter whose
    path it bears."""
    known = shardings(table, placement)
    whole = replicated(placement)

    def of(path: tuple[Any, ...], leaf: Any) -> jax.sharding.Sharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        owner = names[-1] if names else None
        return known[owner] if owner in known and leaf.shape == table[owner].shape else whole

    return jax.tree_util.tree_map_with_path(of, abstract)


def build(
    make: Callable[..., State], table: Mapping[str, Spec], placement: Placement, *given: Any
) -> tuple[State, State]:
    """The state that `make` traces from what is given and donated, made where it belongs, and its
    shardings."""
    where = place(jax.eval_shape(make, *given), table, placement)
    # It runs once: on a CPU, a lightly optimized program is ready in a third of the time.
    options = {"xla_backend_optimization_level": 1} if placement.platform == "cpu" else {}
    with placed(placement):
        program = jax.jit(make, out_shardings=where, donate_argnums=tuple(range(len(given))))
        return program.lower(*given).compile(options)(*given), where
