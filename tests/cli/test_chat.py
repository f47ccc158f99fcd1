"""A conversation that goes on, whatever a line holds, and says when its context is full."""

import dataclasses
from pathlib import Path

import jax
import pytest

from ropewalk import models
from ropewalk.checkpoint.pretrained import Pretrained, abstract
from ropewalk.layers.lm import parameters
from ropewalk.text.tokenizer import HuggingFaceTokenizer, byte_tokenizer
from tests.cli.invoke import Outcome, ropewalk

TEMPLATE = "{% for m in messages %}{{ m.role[0] + ':' + m.content + ';' }}{% endfor %}"
POSITIONS = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes whose zeros write the same byte for ever."""
    values = {
        "family": "llama", "vocab_size": 259, "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": POSITIONS,
    }  # fmt: skip
    family, config = models.from_recipe(values)
    shapes = parameters(abstract(family, config))
    plain = byte_tokenizer()
    tokenizer = HuggingFaceTokenizer(
        plain._parsing, "test", dataclasses.replace(plain.roles, chat_template=TEMPLATE)
    )
    zeros = {path: jax.numpy.zeros(leaf.shape) for path, leaf in shapes.items()}
    where = tmp_path_factory.mktemp("chat") / "model"
    return Pretrained(family, config, zeros, tokenizer, "zeros").save(where)


def chat(model: Path, *lines: str, new: int = 3) -> Outcome:
    outcome = ropewalk("chat", str(model), "--max-new-tokens", str(new), stdin="".join(lines))
    assert outcome.code == 0, outcome.stderr
    return outcome


def test_blank_lines_are_no_turns_and_line_ends_no_text(model: Path) -> None:
    plain = chat(model, "hi\n", "you\n")
    assert plain.stdout.count("\n") == 2
    assert chat(model, "\n", "hi\r\n", "  \r\n", "you").stdout == plain.stdout


def test_a_full_context_is_told_and_the_conversation_goes_on(model: Path) -> None:
    long = "x" * POSITIONS + "\n"
    outcome = chat(model, long, "hi\n")
    assert outcome.stdout == chat(model, "hi\n").stdout
    assert "68 tokens do not fit" in outcome.stderr
    assert f"context of {POSITIONS} tokens is full; /reset begins anew" in outcome.stderr


def test_an_answer_that_the_context_cuts_off_says_so(model: Path) -> None:
    outcome = chat(model, "y" * 50 + "\n", "z\n", "/reset\n", "hi\n", new=500)
    answers = outcome.stdout.split("\n")
    turns = "u:" + "y" * 50 + ";", "u:hi;"
    assert [len(answer) for answer in answers] == [*(POSITIONS - len(turn) for turn in turns), 0]
    assert outcome.stderr.count("the answer is cut off") == 2
    assert outcome.stderr.count("do not fit") == 1


def test_a_line_that_is_no_text_is_told_and_the_conversation_goes_on(model: Path) -> None:
    outcome = chat(model, "a\udcff\n", "hi\n")
    assert outcome.stdout == chat(model, "hi\n").stdout
    assert "give it as UTF-8" in outcome.stderr
