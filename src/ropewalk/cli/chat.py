"""`ropewalk chat`."""

import sys
from typing import Annotated

import typer


def chat(
    model: Annotated[
        str, typer.Argument(help="Hugging Face directory, run or .gguf file with a chat template")
    ],
    system: Annotated[str, typer.Option(help="the system message")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the most likely")] = 0.0,
    top_p: float = 0.9,
    seed: int = 0,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; by default that of the file")
    ] = "",
) -> None:
    """Talk with a model; each line of standard input is a turn, /reset begins anew, end of file
    leaves."""
    from ropewalk.checkpoint.pretrained import load  # start-up time
    from ropewalk.core.compilation import keep_programs
    from ropewalk.layers.decode import Sampling
    from ropewalk.text import chat as templates

    keep_programs()
    knobs = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    sampling = Sampling.parse(knobs, "chat")
    lm = load(model, dtype or None)
    tokenizer = lm.require_tokenizer()
    opening = [{"role": "system", "content": system}] if system else []
    templates.render(
        tokenizer, [*opening, {"role": "user", "content": "hello"}]
    )  # no template: say so before the first turn
    messages = list(opening)
    while (line := _turn()) is not None:
        if line.strip() == "/reset":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": line})
        answer = []
        for piece in lm.stream(templates.encode(tokenizer, messages), sampling):
            answer.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        messages.append({"role": "assistant", "content": "".join(answer)})


def _turn() -> str | None:
    """One line of input, or None at its end."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None
