"""`ropewalk data`."""

from typing import Annotated

import typer


def data(
    recipe: Annotated[str, typer.Argument(help="a recipe, as for train")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="changes to the recipe, e.g. data.length=128")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="packed rows to show, token by token")] = 4,
    batches: Annotated[int, typer.Option(min=1, help="batches to take and count")] = 20,
) -> None:
    """Show packed examples, boundaries and trained tokens visible, and count tokens, truncations
    and padding."""
    from rich.console import Console  # start-up time

    from ropewalk.data import pipeline, show, stats
    from ropewalk.train import build, run

    described = run.read(recipe, overrides or [])
    tokenizer = build.tokenizer_of(described)
    stream = pipeline.Batches(described.data, tokenizer)
    console = Console(soft_wrap=True)
    console.print(show.legend())
    counted = stats.Stats()
    shown = 0
    for _, batch in zip(range(batches), stream, strict=False):
        counted.add(batch)
        for i in range(min(rows - shown, len(batch.names))):
            console.rule(", ".join(dict.fromkeys(batch.names[i])))
            console.print(show.row(batch, i, tokenizer))
            shown += 1
    stream.close()
    console.print(show.summary(counted))
