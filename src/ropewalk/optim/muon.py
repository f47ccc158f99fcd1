"""Muon: momentum whose matrices are orthogonalised by Newton-Schulz iterations, AdamW for all that
is no matrix.

kellerjordan.github.io/posts/muon; updates scaled to AdamW's size, so that one learning rate fits
both: arXiv:2502.16982.
"""

from collections.abc import Mapping
from typing import Any

import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from ropewalk.core.paths import Spec
from ropewalk.parallel.axes import kind

_ADAMW_RMS = 0.2


def build(
    rate: optax.Schedule,
    rest: optax.GradientTransformation,
    epsilon: float,
    weight_decay: float,
    mask: Mapping[str, bool],
    table: Mapping[str, Spec],
) -> optax.GradientTransformation:
    """The transformation for parameters `path -> array`: Muon at `rate` for matrices, `rest` for
    all others; `mask` says which parameters decay."""
    dims = {path: dimensions(spec) for path, spec in table.items()}
    # What optax calls "adam" in its Muon decays every parameter, norm scales too: it gets none.
    only: Any = {path: optax.MaskedNode() if dim is None else dim for path, dim in dims.items()}
    matrices = optax_muon(
        rate,
        eps=epsilon,
        weight_decay=weight_decay,
        weight_decay_mask=dict(mask),
        muon_weight_dimension_numbers=only,
        consistent_rms=_ADAMW_RMS,
    )
    labels = {path: "rest" if dim is None else "matrix" for path, dim in dims.items()}
    return optax.partition({"matrix": matrices, "rest": rest}, labels)


def dimensions(spec: Spec) -> MuonDimensionNumbers | None:
    """Which dims of a parameter are the two sides of its matrix: the hidden (or else the latent)
    features, and all others but those that count matrices, `layers` and experts in front."""
    if kind(spec) != "matrix":
        return None
    first = next(dim for dim, axis in enumerate(spec.axes) if axis != "layers")
    first += spec.axes[first] == "experts"
    dims = range(first, len(spec.axes))
    feature = "embed" if "embed" in spec.axes else "latent"
    hidden = tuple(dim for dim in dims if spec.axes[dim] == feature)
    other = tuple(dim for dim in dims if spec.axes[dim] != feature)
    return MuonDimensionNumbers(*((hidden, other) if hidden[0] < other[0] else (other, hidden)))
