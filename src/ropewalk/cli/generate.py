"""`ropewalk generate`."""

import sys
from typing import Annotated

import typer


def generate(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, run or .gguf file")],
    prompt: Annotated[str, typer.Option(help="text to go on from; `-` reads standard input")] = "",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="by default 128, or as many as the prompt leaves of the model's positions"
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most likely token")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="only the k most likely tokens; 0 = all")] = 0,
    top_p: Annotated[
        float, typer.Option(help="only the most likely tokens with this total probability")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="of the chance in choosing tokens")] = 0,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; by default that of the file")
    ] = "",
) -> None:
    """Write text after a prompt."""
    from ropewalk.checkpoint.pretrained import load  # start-up time
    from ropewalk.core.compilation import keep_programs
    from ropewalk.layers.decode import Sampling

    keep_programs()
    sampling = Sampling.parse(
        {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
        },
        "generate",
    )
    lm = load(model, dtype or None)
    text = sys.stdin.read() if prompt == "-" else prompt
    pieces = lm.stream(lm.encode(text), sampling, follows=True)
    sys.stdout.write(text)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
