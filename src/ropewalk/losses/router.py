"""What keeps routers healthy, from what layers report: balance of their experts' load, and logits
that stay small."""

from typing import Literal

import jax
import jax.numpy as jnp

Aux = dict[str, jax.Array]

_TINY = 1e-20


def balance(aux: Aux, weights: jax.Array, over: Literal["batch", "sequence"]) -> jax.Array:
    """Float32 [l]: of every layer e sum_e(load share x mean probability), 1 where all is even, as a
    sum over rows with weights [b] and not yet divided by them.

    Shares and means are over all rows together (arXiv:2101.03961 equation 4), or over each row
    (arXiv:2412.19437 equation 17). Only the probability has a gradient.
    """
    load, probability = aux["router_load"], aux["router_probability"]  # [l, b, e]
    if over == "batch":
        load, probability = (jnp.sum(a, axis=1, keepdims=True) for a in (load, probability))
        weights = jnp.sum(weights, keepdims=True)
    even = jnp.sum(_shares(load) * _shares(probability), axis=-1) * load.shape[-1]
    return jnp.sum(even * weights, axis=1)


def z(aux: Aux, weights: jax.Array) -> jax.Array:
    """Float32 [l]: of every layer the mean over a row's tokens of the squared log-normaliser of the
    logits, as a sum over rows with weights [b]. arXiv:2202.08906 equation 5"""
    tokens = jnp.sum(aux["router_probability"], axis=-1)
    return jnp.sum(aux["router_z"] / jnp.maximum(tokens, 1.0) * weights, axis=1)


def max_load(load: jax.Array) -> jax.Array:
    """The largest share of an expert in any layer, times the number of experts, of choices [l, e]:
    1 where all is even."""
    return jnp.max(_shares(load)) * load.shape[-1]


def _shares(counts: jax.Array) -> jax.Array:
    return counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), _TINY)
