"""The objective against its definition from full logits; its pairs add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.core.errors import ConfigError
from ropewalk.losses.next_token import NextToken
from tests.families.tiny import batch, tiny

NAME = "llama"


def output(batch, z_loss=0.0):
    it = tiny(NAME)
    return jax.jit(
        lambda params, b: NextToken(z_loss=z_loss)(it.model(params), b, jax.random.key(0))
    )(it.params, batch)


def by_hand(batch, z_loss):
    """Sums over all logits at once, in float64."""
    logits = tiny(NAME).model()(batch["tokens"], batch["positions"], batch["segment_ids"])[0]
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.sum(np.exp(logits), axis=-1))
    chosen = np.take_along_axis(logits, np.asarray(batch["targets"])[..., None], -1)[..., 0]
    weights = np.asarray(batch["weights"])
    nats = np.sum(weights * (log_z - chosen))
    right = np.sum(weights * (np.argmax(logits, -1) == np.asarray(batch["targets"])))
    return nats + z_loss * np.sum(weights * log_z**2), nats, right, weights.sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_equals_the_definition(z_loss):
    found = output(batch(), z_loss)
    objective, nats, right, weight = by_hand(batch(), z_loss)
    np.testing.assert_allclose(found.objective, (objective, weight), rtol=1e-5)
    np.testing.assert_allclose(found.metrics["loss"], (nats, weight), rtol=1e-5)
    np.testing.assert_allclose(found.metrics["accuracy"], (right, weight), rtol=1e-6)


def test_pairs_of_parts_add_up_to_the_pair_of_the_whole():
    whole = output(batch(), 0.01)
    parts = [
        output({name: a[rows] for name, a in batch().items()}, 0.01)
        for rows in (slice(0, 3), slice(3, 8))
    ]
    added = jax.tree.map(jnp.add, *parts)
    for mine, theirs in zip(jax.tree.leaves(added), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_the_loss_is_of_the_last_hidden_states_of_one_forward():
    weightless = {**batch(), "weights": jnp.zeros_like(batch()["weights"])}
    found = output(weightless)
    assert [float(leaf) for leaf in jax.tree.leaves(found)] == [0.0] * 6


def test_a_negative_z_loss_is_refused():
    with pytest.raises(ConfigError, match="z_loss"):
        NextToken.parse({"z_loss": -1}, "objective")
