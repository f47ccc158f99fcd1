"""Names of number formats."""

import jax.numpy as jnp

from ropewalk.core.errors import ConfigError

_SPELLINGS = {
    "float32": "float32", "fp32": "float32", "f32": "float32", "F32": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16", "BF16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16", "F16": "float16",
}  # fmt: skip


def parse(name: str) -> jnp.dtype:
    """The dtype for a name as Hugging Face, safetensors or a person spells it. Raises
    ConfigError."""
    spelling = _SPELLINGS.get(name.removeprefix("torch.")) if isinstance(name, str) else None
    if spelling is None:
        raise ConfigError(f"dtype `{name}` is not supported; use one of float32, bfloat16, float16")
    return jnp.dtype(spelling)
