"""`ropewalk serve`."""

from pathlib import Path
from typing import Annotated

import typer

from ropewalk.serve.options import Options


def serve(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, run or .gguf file")],
    host: Annotated[str, typer.Option(help="address to listen on")] = Options.host,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = Options.port,
    name: Annotated[
        str, typer.Option(help="what requests call the model; by default the file's name")
    ] = Options.name,
    slots: Annotated[
        int, typer.Option(min=1, max=1024, help="sequences written at a time")
    ] = Options.slots,
    max_length: Annotated[
        int,
        typer.Option(
            min=0, help="most tokens of a prompt and its answer; 0: the model's, at most 4096"
        ),
    ] = Options.max_length,
    queue: Annotated[
        int, typer.Option(min=1, help="sequences that may wait for a slot; more are answered 429")
    ] = Options.queue,
    rules: Annotated[
        str, typer.Option(help="spreads the model over all devices as training does, e.g. tensor")
    ] = Options.rules,
    drafts: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=16,
            show_default=False,
            help="tokens guessed ahead of a step; by default 0, and 4 where a draft model guesses",
        ),
    ] = Options.drafts,
    draft_model: Annotated[
        str, typer.Option(help="smaller model with the same tokenizer, which guesses ahead")
    ] = Options.draft_model,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="file with a key a line; without, ROPEWALK_API_KEY, or no key"),
    ] = Options.api_key_file,
    drain: Annotated[
        float, typer.Option(min=0, help="seconds that answers have to end after SIGTERM")
    ] = Options.drain,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; by default that of the file")
    ] = Options.dtype,
    cache: Annotated[
        str, typer.Option(help="int8 keeps keys and values in 8 bits; by default the model's dtype")
    ] = Options.cache,
    trace: Annotated[
        Path | None, typer.Option(help="directory for a profile of the first 100 steps")
    ] = Options.trace,
) -> None:
    """Serve a model to OpenAI's clients."""
    from ropewalk.serve.launch import launch  # start-up time

    launch(
        Options(
            model, host, port, name, slots, max_length, queue, rules, drafts, draft_model,
            api_key_file, drain, dtype, cache, trace,
        )
    )  # fmt: skip
