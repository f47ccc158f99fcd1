"""`ropewalk train`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[
        str, typer.Argument(help="a YAML file, or the name of a bundled recipe, e.g. tiny")
    ] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="changes to the recipe, e.g. optimizer.learning_rate=1e-3; `--print-config all` "
            "lists every key"
        ),
    ] = None,
    print_config: Annotated[
        str,
        typer.Option(
            help="print what differs from the defaults (`changes`) or every key (`all`), and leave"
        ),
    ] = "",
    print_schema: Annotated[
        bool,
        typer.Option(
            "--print-schema", help="print the recipe's JSON Schema for editors, and leave"
        ),
    ] = False,
) -> None:
    """Train a model as a recipe says; the same command again goes on where the run stopped."""
    from ropewalk.core.errors import ConfigError  # start-up time
    from ropewalk.metrics.report import RECIPE_FILE
    from ropewalk.train import run as runs

    if print_schema:
        print(json.dumps(runs.Run.model_json_schema(), indent=2))
        return
    if not recipe:
        raise typer.BadParameter("name a recipe: a YAML file, or a bundled one, e.g. tiny")
    kept = Path(recipe) / RECIPE_FILE
    if kept.is_file():
        raise ConfigError(
            f"`{recipe}` is a directory; the recipe in it is {kept}. If it is that of a run, the "
            "command that began the run goes on with it"
        )
    run = runs.read(recipe, overrides or [])
    if print_config:
        _print_config(run, print_config)
        return
    from ropewalk.train import loop  # start-up time

    result = loop.train(run)
    _tell(result)
    if result.signal is not None:
        sys.exit(128 + result.signal)


def _print_config(run, which: str) -> None:
    import yaml  # start-up time

    if which not in ("changes", "all"):
        raise typer.BadParameter(f"--print-config {which}: use `changes` or `all`")
    values = run.changes() if which == "changes" else run.model_dump(mode="json")
    print(yaml.safe_dump(values, sort_keys=False), end="")


def _tell(result) -> None:
    """What a person wants to know at the end: how good, where it is, what to try next."""
    if result.status == "stopped":
        print(f"stopped at step {result.steps} and saved; the same command goes on from there")
        return
    print(f"report: {result.directory / 'report.html'}")
    if result.export is not None:
        print(f"Hugging Face directory: {result.export}")
        print("next:")
        print(f'  ropewalk generate {result.export} --prompt "O Romeo, "')
        print(f"  ropewalk inspect {result.export}")
        print(f"  ropewalk verify {result.checkpoint} --against {result.export}")
    bits = result.evaluation.get("eval_bits_per_byte")
    if bits is not None:
        print(f"held-out: {bits:.2f} bits per byte")
