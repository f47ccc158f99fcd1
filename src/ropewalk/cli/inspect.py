"""`ropewalk inspect`."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

# What a checkpoint keeps beside the model.
_BESIDE = ("opt_state", "extra", "step")
# What a token costs depends on how many others it sees: of a sequence of so many.
_LENGTH = 4096


def inspect(
    path: Annotated[
        str, typer.Argument(help="a recipe, run, checkpoint, model directory, .gguf file or preset")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="as one JSON object, the whole config included")
    ] = False,
) -> None:
    """What is in it: parameters, shapes, dtypes, bytes, operations a token."""
    from ropewalk.checkpoint import pretrained  # start-up time

    place = Path(path).expanduser()
    found = pretrained.stored(place)
    if found is not None:
        kind, named = found.kind, found.named
        rows = [_row(name, record) for name, record in found.tensors.items()]
    else:
        kind, named, rows = _described(path)
    model = [shape for name, shape, _, _ in rows if name.partition(".")[0] not in _BESIDE]
    total = {"parameters": sum(map(math.prod, model)), "bytes": sum(size for *_, size in rows)}
    whole = pretrained.abstract(*named)
    length = min(_LENGTH, named.config.longest())
    total["active_parameters"] = round(whole.active())
    total["flops_per_token"] = round(whole.flops(1, length))
    config = {"family": named.config.family(), **named.config.model_dump(mode="json")}
    if as_json:
        listed = [{"name": n, "shape": s, "dtype": d, "bytes": b} for n, s, d, b in rows]
        print(json.dumps({"kind": kind, "config": config, **total, "tensors": listed}, indent=2))
        return
    width = max(len(name) for name, *_ in rows)
    for name, shape, dtype, size in rows:
        print(
            f"{name:{width}}  {'x'.join(map(str, shape)) or 'scalar':>18}  {dtype:>9}  "
            f"{_amount(size):>10}"
        )
    print(f"{kind} {path}: {config.pop('family')}, {len(rows)} tensors")
    print(f"{total['parameters']:,} parameters; {_amount(total['bytes'])} in all")
    print(
        f"{total['active_parameters']:,} of them work on a token; "
        f"{total['flops_per_token'] / 1e9:,.3g} GFLOP a token forward, in {length} tokens"
    )
    print(
        "  ".join(f"{key}={value}" for key, value in config.items() if not isinstance(value, dict))
    )


def _row(name: str, record: Any) -> tuple[str, list[int], str, int]:
    """Name, shape, dtype and bytes of a tensor as a checkpoint, a safetensors file or a GGUF file
    describes it."""
    import numpy as np  # start-up time

    if hasattr(record, "n_bytes"):  # gguf: dims from the fastest on
        return (
            name,
            [int(n) for n in reversed(record.shape)],
            record.tensor_type.name,
            int(record.n_bytes),
        )
    shape = list(record.shape)
    if hasattr(record, "start"):
        return name, shape, record.dtype, record.end - record.start
    import ml_dtypes  # start-up time; registers bfloat16 with numpy

    size = np.dtype(getattr(ml_dtypes, record.dtype, record.dtype)).itemsize
    return name, shape, record.dtype, math.prod(shape) * size


def _described(path: str) -> tuple[str, Any, list[tuple[str, list[int], str, int]]]:
    """A recipe or a preset: what the model will hold."""
    from ropewalk import models  # start-up time
    from ropewalk.checkpoint.pretrained import abstract, no_model
    from ropewalk.layers.lm import table
    from ropewalk.train import build, run

    place, presets = Path(path).expanduser(), models.presets()
    if path in presets:
        kind, named = "preset", presets[path]
    elif (
        place.is_dir()
        or place.suffix == ".safetensors"
        or (not place.exists() and models.near(path, presets))
    ):
        raise no_model(path)
    else:
        kind, named = "recipe", build.model_of(run.read(path))
    specs = table(abstract(named.family, named.config))
    rows = [
        (name, list(spec.shape), str(spec.dtype), math.prod(spec.shape) * spec.dtype.itemsize)
        for name, spec in specs.items()
    ]
    return kind, named, rows


def _amount(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise ValueError(size)
