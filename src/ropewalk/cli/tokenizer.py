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
    vocab_size: Annotated[int, typer.Option(help="most ids, special ones included")] = 8192,
    column: Annotated[str, typer.Option(help="of the text, in records")] = "text",
) -> None:
    """Train a byte-level BPE on text files; what it writes opens in every tool that reads
    tokenizer.json."""
    from ropewalk.core.errors import UserError  # start-up time
    from ropewalk.data import pipeline
    from ropewalk.text import bpe

    held = [path.name for path in output.iterdir()] if output.is_dir() else []
    foreign = [name for name in held if name not in ("tokenizer.json", "tokenizer_config.json")]
    if foreign or (output.exists() and not output.is_dir()):
        what = f"holds {min(foreign)}" if foreign else "is a file"
        raise UserError(f"{output}: {what}; choose an empty or new directory for the tokenizer")
    config = pipeline.Config.parse(
        {"sources": [{"path": files, "column": column}]}, "tokenizer train"
    )
    tokenizer = bpe.train(pipeline.texts(config), vocab_size)
    tokenizer.save(output)
    print(f"{output}: {tokenizer.vocab_size} tokens")
