"""`ropewalk import`."""

from pathlib import Path
from typing import Annotated

import typer


def import_(
    source: Annotated[str, typer.Argument(help="the model to bring in")],
    directory: Annotated[Path, typer.Argument(help="where the Hugging Face directory goes")],
    format: Annotated[str, typer.Option(help="of the source: gguf or hf")] = "",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; by default that of the source")
    ] = "",
) -> None:
    """Bring a foreign checkpoint in, as a Hugging Face directory that every command here takes."""
    from ropewalk.cli.export import export  # start-up time
    from ropewalk.core.errors import ModelError

    path = Path(source).expanduser()
    found = "hf" if path.is_dir() else path.suffix.removeprefix(".")
    if format and format not in ("gguf", "hf"):
        raise ModelError(f"--format {format} is not supported; supported: gguf, hf")
    if format and path.exists() and format != found:
        raise ModelError(f"{source}: is {found}, not {format}; check the path and --format")
    export(source, directory, dtype)
