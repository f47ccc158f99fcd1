"""`ropewalk verify`."""

import json
import sys
from typing import Annotated

import typer


def verify(
    model: Annotated[
        str, typer.Argument(help="the model to check: run, checkpoint, directory or .gguf file")
    ],
    against: Annotated[str, typer.Option(help="the Hugging Face directory it should equal")],
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="largest difference of tensors and logits")
    ] = 1e-4,
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON object")] = False,
) -> None:
    """Compare two models: config, every tensor, the tokenizer, and logits in float32. Exit code 1
    when they differ."""
    from ropewalk.checkpoint.compare import compare  # start-up time

    result = compare(model, against)
    same = result.same(tolerance)
    if as_json:
        print(json.dumps({"equal": same, **result.summary()}, indent=2))
    else:
        for line in result.lines():
            print(line)
        print("equal" if same else "different")
    sys.exit(0 if same else 1)
