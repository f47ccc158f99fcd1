"""`ropewalk export`."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[
        str, typer.Argument(help="a run, one of its checkpoints, or any other model")
    ],
    directory: Annotated[Path, typer.Argument(help="where the Hugging Face directory goes")],
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; by default that of the weights")
    ] = "",
) -> None:
    """Write a Hugging Face directory: config.json, safetensors, tokenizer and chat template."""
    from ropewalk.checkpoint.hf import check_target  # start-up time
    from ropewalk.checkpoint.pretrained import load
    from ropewalk.core.dtypes import parse

    kept = str(parse(dtype)) if dtype else None
    check_target(directory)
    print(load(checkpoint).save(directory, kept))
