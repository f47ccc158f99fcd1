"""`ropewalk chat`."""

import sys
from typing import Annotated

import typer


def chat(
    model: Annotated[
        str, typer.Argument(help="Hugging Face directory, run or .gguf file with a chat template")
    ],
    system: Annotated[str, typer.Option(help="the system message")] = "",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="of an answer, where the context has room for them")
    ] = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most likely token")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="only the most likely tokens with this total probability")
    ] = 0.9,
    seed: Annotated[int, typer.Option(min=0, help="of the chance in choosing tokens")] = 0,
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
    sampling = Sampling.parse({"temperature": temperature, "top_p": top_p, "seed": seed}, "chat")
    lm = load(model, dtype or None)
    tokenizer = lm.require_tokenizer()
    opening = [{"role": "system", "content": system}] if system else []
    templates.render(
        tokenizer, [*opening, {"role": "user", "content": "hello"}]
    )  # no template: say so before the first turn
    _converse(lm, opening, sampling, max_new_tokens)


def _converse(lm, opening: list[dict[str, str]], sampling, max_new_tokens: int) -> None:
    """Answers line after line; what cannot be answered is told and forgotten."""
    from ropewalk.core.errors import UserError  # start-up time
    from ropewalk.core.log import log
    from ropewalk.text import chat as templates

    positions = lm.config.longest()
    full = f"the context of {positions} tokens is full; /reset begins anew"
    messages = list(opening)
    while (line := _turn()) is not None:
        if line == "/reset":
            messages = list(opening)
        if line in ("", "/reset"):
            continue
        turn = {"role": "user", "content": line}
        try:
            ids = templates.encode(lm.tokenizer, [*messages, turn])
        except UserError as error:
            log.warning("%s", error)
            continue
        left = positions - len(ids)
        if left < 1:
            log.warning("%d tokens do not fit: %s", len(ids) + 1, full)
            continue
        room = sampling.model_copy(update={"max_new_tokens": min(left, max_new_tokens)})
        answer = []
        for piece in lm.stream(ids, room):
            answer.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        if len(answer) > left:
            log.warning("the answer is cut off: %s", full)
        messages += [turn, {"role": "assistant", "content": "".join(answer)}]


def _turn() -> str | None:
    """One line of input, or None at its end."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line.rstrip() if line else None
