"""`ropewalk doctor`."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import ropewalk
from ropewalk.core.memory import physical_memory

_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "pydantic", "typer", "rich",
    "tokenizers", "sentencepiece", "safetensors", "jinja2", "gguf", "tensorboardX", "pyarrow",
    "array-record",
)  # fmt: skip
_EXTRAS = {"wandb": "writing to Weights & Biases"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON object")] = False,
) -> None:
    """Devices, versions, memory, and what is missing with the line that installs it. Exit code 1
    when training cannot work."""
    facts = _facts()
    missing = [name for name in _PACKAGES if facts["versions"][name] is None]
    advice = [f"{name} is missing: pip install {name}" for name in missing]
    advice += _accelerator_advice(facts)
    advice += [
        f"{package} is absent ({purpose} needs it): pip install 'ropewalk[{package}]'"
        for package, purpose in _EXTRAS.items()
        if importlib.util.find_spec(package) is None
    ]
    if as_json:
        print(json.dumps({**facts, "advice": advice}, indent=2))
    else:
        for name, value in facts.items():
            shown = (
                ", ".join(f"{k} {v or 'missing'}" for k, v in value.items())
                if isinstance(value, dict)
                else value
            )
            print(f"{name + ':':12} {shown}")
        for line in advice:
            print(f"- {line}")
    sys.exit(1 if missing or facts["devices"] == "none" else 0)


def _facts() -> dict[str, Any]:
    from ropewalk.core.compilation import programs_directory  # start-up time

    return {
        "ropewalk": ropewalk.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "memory": f"{physical_memory() / 2**30:.1f} GiB of RAM",
        "disk": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free here",
        "devices": (devices := _devices()),
        "kernels": _kernels(devices),
        "programs": f"kept in {programs_directory()}",
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _devices() -> str:
    try:
        import jax  # start-up time

        found = jax.devices()
    except (ImportError, RuntimeError) as error:
        return f"none ({error})"
    kind = found[0].device_kind
    sizes = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in found]
    memory = f", {sizes[0] / 2**30:.1f} GiB each" if sizes[0] else ""
    return f"{len(found)} x {found[0].platform} ({kind}{memory})"


def _kernels(devices: str) -> str:
    if " x cpu" not in devices:
        return "XLA's"
    from ropewalk.ops.kernels import cpu  # start-up time

    return cpu.built() or "built for this CPU"


def _accelerator_advice(facts: dict[str, Any]) -> list[str]:
    """An accelerator that the machine has and JAX does not use."""
    seen = facts["devices"]
    advice = []
    if Path("/proc/driver/nvidia").exists() and "gpu" not in seen:
        advice.append(
            "an NVIDIA driver is here and JAX does not use the GPU: pip install 'ropewalk[cuda]'"
        )
    if any(Path("/dev").glob("accel*")) and "tpu" not in seen:
        advice.append("a TPU is here and JAX does not use it: pip install 'ropewalk[tpu]'")
    return advice


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
