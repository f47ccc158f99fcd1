"""`ropewalk tokenizer`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Make tokenizers.")


@app.callback()
def group() -> None:
    """Make tokenizers."""


@app.command()
def train(
    files: Annotated[
        list[str],
        typer.Argument(
            help="text files: .txt, .jsonl, .parquet, .arrayrecord; globs; bundled:NAME"
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="directory for tokenizer.json")],
    vocab_size: Annotated[int, typer.Option(help="ids, special ones included")] = 8192,
    column: Annotated[str, typer.Option(help="of the text, in records")] = "text",
) -> None:
    """Train a byte-level BPE on text files; what it writes opens in every tool that reads
    tokenizer.json."""
    from ropewalk.data import pipeline  # start-up time
    from ropewalk.text import bpe

    config = pipeline.Config.parse(
        {"sources": [{"path": files, "column": column}]}, "tokenizer train"
    )
    tokenizer = bpe.train(pipeline.texts(config), vocab_size)
    tokenizer.save(output)
    print(f"{output}: {tokenizer.vocab_size} tokens")
