"""Named rule tables: which mesh axes each logical axis spreads over. Data, not code.

`embed` is split by `fsdp` in parameters only; the activations' `hidden` stays whole and their
`batch` is split instead.
"""

from collections.abc import Mapping

Rules = Mapping[str | None, tuple[str, ...]]

_BATCH = {"batch": ("data", "fsdp"), "time": ("context",)}
_FSDP = {"embed": ("fsdp",)}
_TENSOR = {"vocab": ("tensor",), "mlp": ("tensor",), "heads": ("tensor",), "kv_heads": ("tensor",)}

RULES: dict[str, Rules] = {
    "fsdp": {**_BATCH, **_FSDP},
    "tensor": {**_BATCH, **_TENSOR},
    "fsdp_tensor": {**_BATCH, **_FSDP, **_TENSOR},
    "fsdp_expert": {**_BATCH, "batch": ("data", "fsdp", "expert"), **_FSDP, "experts": ("expert",)},
}
