"""`ropewalk serve`."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, run or .gguf file")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    name: Annotated[
        str, typer.Option(help="what requests call the model; by default the file's name")
    ] = "",
    slots: Annotated[int, typer.Option(min=1, max=1024, help="sequences written at a time")] = 8,
    max_length: Annotated[
        int,
        typer.Option(
            min=0, help="most tokens of a prompt and its answer; 0: the model's, at most 4096"
        ),
    ] = 0,
    queue: Annotated[
        int, typer.Option(min=1, help="sequences that may wait; more are answered 429")
    ] = 256,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="file with a key a line, else ROPEWALK_API_KEY; none: no key is needed"),
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0, help="seconds that answers have to end after SIGTERM")
    ] = 30.0,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; by default that of the file")
    ] = "",
    cache: Annotated[
        str, typer.Option(help="of keys and values: int8, or by default what the model is in")
    ] = "",
    trace: Annotated[
        Path | None, typer.Option(help="directory for a profile of the first 100 steps")
    ] = None,
) -> None:
    """Serve a model to OpenAI's clients."""
    from ropewalk.serve.launch import Options, launch  # start-up time

    launch(
        Options(
            model,
            host,
            port,
            name,
            slots,
            max_length,
            queue,
            api_key_file,
            drain,
            dtype,
            cache,
            trace,
        )
    )
